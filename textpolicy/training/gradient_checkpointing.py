"""Gradient checkpointing: the backward pass recomputes the activations of each block.

    Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174.

The backward pass keeps the input of each block instead of all activations of each block, and costs
one more forward pass. One model is changed for a while; other models of its class are not.
"""

import inspect
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from textpolicy.errors import TrainingError


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

    signature = inspect.signature(plain.__call__)

    def __call__(self: nn.Module, *positional: Any, **named: Any) -> Any:
        # Gradients flow through arguments and results only, not through captured variables.
        # Therefore weights, array masks and cached keys are arguments and results too.
        def run(weights: Any, arrays: Any, state: Any) -> tuple[Any, Any]:
            self.update(weights)
            bound.arguments.update(arrays)
            with same_draws:
                if cache is None:
                    return plain.__call__(*bound.args, **bound.kwargs), None
                cache.state = state
                return plain.__call__(*bound.args, **bound.kwargs), cache.state

        same_draws = _SameDraws()
        bound = signature.bind(self, *positional, **named)
        cache: Any = bound.arguments.get("cache")
        if isinstance(cache, tuple):
            cache = None  # falcon_h1 of mlx-lm 0.32 passes a pair of None for no cache.
        others = {n: x for n, x in bound.arguments.items() if n not in ("self", "cache")}
        _check_all_seen(plain, others)
        weights = self.trainable_parameters()
        state = None if cache is None else cache.state
        result, state = mx.checkpoint(run)(weights, others, state)
        self.update(weights)
        if cache is not None:
            cache.state = state
        return result

    return type(f"Recomputed{plain.__name__}", (plain,), {"__call__": __call__})


def _check_all_seen(block: type[nn.Module], arguments: dict[str, Any]) -> None:
    """Raise if an argument is an object, whose arrays the gradient would not see."""
    for name, value in tree_flatten(arguments):
        if not isinstance(value, mx.array | str | int | float | None):
            raise TrainingError(
                f"gradient checkpointing cannot run {block.__name__}: its argument {name} is a "
                f"{type(value).__name__}, and only arrays and plain values can be computed again. "
                "Train this model without gradient checkpointing"
            )


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
