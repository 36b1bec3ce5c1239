"""What a training step takes of a device's memory: predicted, measured, and shown as table, plot, page and JSON."""
