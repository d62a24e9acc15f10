"""The layers that wrap a frozen layer and add a trained update: LoRA and DoRA."""
