"""Parameter-efficient QLoRA reward models for large backbones."""

__version__ = "0.1.0"
