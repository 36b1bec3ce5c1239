"""Frozen weights: quantized tensors, the handles that hold them, the modules that compute with them."""
