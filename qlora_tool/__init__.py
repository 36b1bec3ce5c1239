"""Fine-tune language models on a quantized base with LoRA, and export the result exactly."""

__version__ = "0.1.0"
