"""PyTorch's CUDA caching allocator and what operators take on a card, modelled."""
