"""Gradient checkpointing: the backward pass recomputes the activations of each block.

    Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174.

The backward pass keeps the input of each block instead of all activations of each block, and costs
one more forward pass. One model is changed for a while; other models of its class are not.
"""

from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn


@contextmanager
def recompute_activations(model: nn.Module) -> Generator[None, None, None]:
    """Let gradients through the model keep each block's input only, inside a `with` block."""
    blocks = cast(list[nn.Module], model.layers)
    classes = [type(block) for block in blocks]
    for block, plain in zip(blocks, classes, strict=True):
        block.__class__ = _recomputing_class(plain)
    try:
        yield
    finally:
        for block, plain in zip(blocks, classes, strict=True):
            block.__class__ = plain


@cache
def _recomputing_class(plain: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass whose `__call__` is an `mx.checkpoint`, and that is equal otherwise."""

    def __call__(self: nn.Module, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        # Gradients flow through arguments and results only, not through captured variables.
        # Therefore weights, array masks and cached keys are arguments and results too.
        def run(weights: Any, x: mx.array, mask: Any, state: Any) -> tuple[mx.array, Any]:
            self.update(weights)
            with same_draws:
                if cache is None:
                    return plain.__call__(self, x, mask), None
                cache.state = state
                return plain.__call__(self, x, mask, cache), cache.state

        same_draws = _SameDraws()
        weights = self.trainable_parameters()
        state = None if cache is None else cache.state
        y, state = mx.checkpoint(run)(weights, x, mask, state)
        self.update(weights)
        if cache is not None:
            cache.state = state
        return y

    return type(f"Recomputed{plain.__name__}", (plain,), {"__call__": __call__})


class _SameDraws:
    """Repeats the random numbers of the first computation in the second one.

    The first computation moves mlx's random state as usual; the second one leaves the state as is.
    """

    def __init__(self) -> None:
        self._first = mx.array(_random_state())
        self._after: mx.array | None = None
        self._again = False

    def __enter__(self) -> None:
        if self._again:
            self._after = mx.array(_random_state())
            _random_state()[:] = self._first

    def __exit__(self, *error: object) -> None:
        if self._after is not None:
            _random_state()[:] = self._after
        self._again = True


def _random_state() -> mx.array:
    # The container cannot be assigned, but its array can be written to.
    return cast(Any, mx.random.state)[0]
