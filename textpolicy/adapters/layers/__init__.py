"""Adapter layers: LoRA and DoRA around linear, embedding and expert layers."""
