"""A causal language model with its frozen weights behind handles: where it comes from, how it is read and named."""
