"""Adapter files: one file of this library, folders of mlx-lm and PEFT, and published versions."""
