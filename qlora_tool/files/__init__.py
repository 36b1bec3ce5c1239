"""Files on the disk: written whole or not at all, tensors in safetensors, what is cached."""
