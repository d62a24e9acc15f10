"""Several demonstrations in one row, none of which sees another.

Attention is held inside each demonstration by an object in the place of a layer's cache. Positions
go on counting along the row: rotary embeddings know distances only, so what each demonstration
computes is what it computes alone.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Bool, Float, Int
from mlx_lm.models.cache import KVCache, make_prompt_cache

from textpolicy.errors import ConfigError

Network = Callable[[Int[mx.array, "batch time"]], Float[mx.array, "batch time out"]]


def separate_segments(
    part: Any, model: nn.Module, segments: Int[mx.array, "batch time"] | None
) -> Network:
    """The model or its body as a function of token ids, packed demonstrations kept apart."""
    if segments is None:
        return part
    cache = [_Segments(segments)] * len(make_prompt_cache(model))
    return lambda inputs: part(inputs, cache=cache)


def check_packable(model: nn.Module) -> None:
    """Refuse a model whose rows remember more than keys and values at distances.

    Recurrent layers, learned positions and masks that a model makes itself: two demonstrations in
    one row tell, beside what the model says of each alone.
    """
    first, second = mx.array([[1, 2, 3, 4]]), mx.array([[3, 1, 2]])
    if all(type(layer) is KVCache for layer in make_prompt_cache(model)):
        segments = mx.array([[0, 0, 0, 0, 1, 1, 1]])
        alone = mx.concatenate([model(first), model(second)], axis=1)
        packed = separate_segments(model, model, segments)(mx.concatenate([first, second], axis=1))
        tolerance = 1e-3 if alone.dtype == mx.float32 else 0.1
        if float(mx.abs(packed - alone).mean()) < tolerance:
            return
    raise ConfigError(
        f"{type(model).__name__} cannot be packed: a demonstration in its rows is influenced by "
        "the one before it. Train without packing; batches are sorted by length all the same"
    )


class _Segments:
    """Stands where a layer's cache would, and lets no position see another segment."""

    offset = 0

    def __init__(self, segments: Int[mx.array, "batch time"]) -> None:
        self._segments = segments

    @property
    def state(self) -> list[mx.array]:
        return []

    @state.setter
    def state(self, state: list[mx.array]) -> None:
        # What is kept here are segments, which reading does not change.
        assert not state

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values

    def make_mask(
        self, time: int, *, window_size: int | None = None, **_: Any
    ) -> Bool[mx.array, "batch 1 time time"]:
        place = mx.arange(time)
        distance = place[:, None] - place[None, :]
        seen = distance >= 0
        if window_size is not None:
            seen = seen & (distance < window_size)
        same = self._segments[:, :, None] == self._segments[:, None, :]
        return (same & seen)[:, None]
