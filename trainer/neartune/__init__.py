"""neartune: LoRA fine-tuning on base models and data that come from a Hub endpoint (see trainer/README.md)."""

__version__ = "0.1.0"
