"""What an adapter learned: its updates by module, their singular values, and the adapter cut to a lower rank."""
