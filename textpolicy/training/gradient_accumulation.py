"""The gradient of an optimizer batch, with one micro-batch in memory at a time."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from textpolicy.layer_gradients import differentiable_layers
from textpolicy.training.gradient_checkpointing import recompute_activations

_Part = TypeVar("_Part")
_Values = TypeVar("_Values", bound=tuple[mx.array, Any])


def accumulate_gradient(
    model: nn.Module,
    loss_fn: Callable[[_Part], _Values],
    parts: Sequence[_Part],
    *,
    checkpoint: bool = False,
    weight: Callable[[_Values], mx.array] | None = None,
    skip: Callable[[_Part], bool] = lambda part: False,
) -> tuple[Any, list[_Values]]:
    """Return the gradient of the first value of `loss_fn`, and all its values for each part.

    The gradient is the sum over the parts. With `weight`, the gradient is the mean over the parts,
    and `weight` returns a part's weight from its values. No backward pass is computed for a part
    if `skip` is true for it. `checkpoint` recomputes activations in the backward pass.
    """
    value_and_grad = nn.value_and_grad(model, loss_fn)
    weighted = weight if len(parts) > 1 else None
    total: Any = None
    values: list[_Values] = []
    for part in parts:
        recompute = recompute_activations(model) if checkpoint else nullcontext()
        with differentiable_layers(model), recompute:
            value, gradient = value_and_grad(part)
        # The activations of the previous part are freed here. The device was busy with them while
        # the graph of this part was built.
        mx.eval(total, values)
        values.append(value)
        if skip(part):
            # mlx computes only what is evaluated, so there is no backward pass.
            del gradient
            mx.eval(value)
            continue
        if weighted:
            factor = weighted(value)
            gradient = tree_map(lambda g, factor=factor: g * factor, gradient)
        total = gradient if total is None else tree_map(mx.add, total, gradient)
        mx.async_eval(total, value)
    if total is None:
        total = tree_map(mx.zeros_like, model.trainable_parameters())
    if weighted:
        sum_of_weights = mx.stack([weighted(value) for value in values]).sum()
        total = tree_map(lambda g: g / sum_of_weights, total)
    return total, values
