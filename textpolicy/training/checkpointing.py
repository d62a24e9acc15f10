"""Gradient checkpointing: a block's activations are computed again instead of kept.

    Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174.

Memory of the backward pass falls from every block's activations to every block's input, for one
more forward pass. One model is changed and changed back: others of its class never notice.
"""

from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn


@contextmanager
def recompute_activations(model: nn.Module) -> Generator[None, None, None]:
    """Inside, gradients through the model keep each block's input only."""
    blocks = cast(list[nn.Module], model.layers)
    kinds = [type(block) for block in blocks]
    for block, kind in zip(blocks, kinds, strict=True):
        block.__class__ = _recomputed(kind)
    try:
        yield
    finally:
        for block, kind in zip(blocks, kinds, strict=True):
            block.__class__ = kind


@cache
def _recomputed(kind: type[nn.Module]) -> type[nn.Module]:
    """The class with a `__call__` that is a checkpoint; nothing else differs."""

    def __call__(self: nn.Module, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        # The gradient flows to what is passed in and from what is returned, and to nothing that
        # the function merely sees: weights, array masks and cached keys are handed through.
        def run(weights: Any, x: mx.array, mask: Any, state: Any) -> tuple[mx.array, Any]:
            self.update(weights)
            with draws:
                if cache is None:
                    return kind.__call__(self, x, mask), None
                cache.state = state
                return kind.__call__(self, x, mask, cache), cache.state

        draws = _SameDraws()
        weights = self.trainable_parameters()
        state = None if cache is None else cache.state
        y, state = mx.checkpoint(run)(weights, x, mask, state)
        self.update(weights)
        if cache is not None:
            cache.state = state
        return y

    return type(f"Recomputed{kind.__name__}", (kind,), {"__call__": __call__})


class _SameDraws:
    """Random numbers of what is computed twice: the first time they are drawn as ever, so that the
    global state moves by what was drawn; again, they are the same, and it stays where it is.
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
    # A container that cannot be assigned to; its array can be written to.
    return cast(Any, mx.random.state)[0]
