"""A training step watched: on fake tensors, on real ones, on a card."""
