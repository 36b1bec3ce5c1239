"""What fits into a device's memory, and what is recomputed so that it does."""
