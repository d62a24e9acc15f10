"""Gradients of recurrent layers, on every device and in memory that grows linearly with length."""

from textpolicy.layer_gradients.substitutes import differentiable_layers

__all__ = ["differentiable_layers"]
