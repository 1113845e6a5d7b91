"""adapterd: one resident base model, hundreds of LoRA adapters, mixed freely in every batch."""

__version__ = "0.1.0"
