"""Adapter files: one file per adapter, folders of mlx-lm and PEFT, and safetensors in general."""
