"""Numbers only: quantized tensors, products on frozen weights, the loss. Knows nothing of models or files."""
