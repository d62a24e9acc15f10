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
def recomputing(model: nn.Module) -> Generator[None, None, None]:
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
            with _drawing_from(key):
                if cache is None:
                    return kind.__call__(self, x, mask), None
                cache.state = state
                return kind.__call__(self, x, mask, cache), cache.state

        key = _next_key()
        weights = self.trainable_parameters()
        state = None if cache is None else cache.state
        y, state = mx.checkpoint(run)(weights, x, mask, state)
        self.update(weights)
        if cache is not None:
            cache.state = state
        return y

    return type(f"Recomputed{kind.__name__}", (kind,), {"__call__": __call__})


def _next_key() -> mx.array:
    """A key of the global random state, which moves on."""
    now = _random_state()
    following, key = mx.random.split(now)
    now[:] = following
    return key


@contextmanager
def _drawing_from(key: mx.array) -> Generator[None, None, None]:
    """Inside, random numbers begin at this key: dropout is the same when it is computed again."""
    now = _random_state()
    before = mx.array(now)
    now[:] = key
    try:
        yield
    finally:
        now[:] = before


def _random_state() -> mx.array:
    # A container that cannot be assigned to; its array can be written to.
    return cast(Any, mx.random.state)[0]
