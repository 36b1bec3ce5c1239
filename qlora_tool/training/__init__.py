"""The training run: one step, the optimizers, the loop around it, checkpoints, evaluation, what is logged."""
