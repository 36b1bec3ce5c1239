"""What values the weights of a quantized file may take, and which of them stand for a matrix best."""
