"""Packing: several demonstrations in one row, none of which attends to another.

An object in place of a layer's KV cache masks attention between demonstrations. Position ids
continue along the row: rotary embeddings depend on distances only, so each demonstration computes
the same numbers as in a row of its own.
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Bool, Float, Int
from mlx_lm.models.cache import KVCache, make_prompt_cache

from textpolicy.errors import ConfigError
from textpolicy.training.sft.demonstrations import Demonstration, PackedRow

TokenFunction = Callable[[Int[mx.array, "batch time"]], Float[mx.array, "batch time out"]]


def pack_rows(demonstrations: Sequence[Demonstration], length: int, rng: Random) -> list[PackedRow]:
    """Return rows of at most `length` targets; a longer demonstration has a row of its own.

    Each demonstration goes to the fullest row that has room for it, longest demonstrations first.
    """
    order = rng.sample(demonstrations, len(demonstrations))
    rows: list[list[Demonstration]] = []
    # Rows by the room they have left, so that the search looks at `length` numbers at most.
    rows_by_room: dict[int, list[int]] = {}
    for one in sorted(order, key=lambda one: -len(one.tokens)):
        need = len(one.tokens) - 1
        fitting = [room for room, open_rows in rows_by_room.items() if open_rows and room >= need]
        room = min(fitting, default=None)
        if room is None:
            row, room = len(rows), max(length, need)
            rows.append([])
        else:
            row = rows_by_room[room].pop()
        rows[row].append(one)
        if room > need:
            rows_by_room.setdefault(room - need, []).append(row)
    rng.shuffle(rows)
    return list(rows)


def separate_segments(
    part: Any, model: nn.Module, segments: Int[mx.array, "batch time"] | None
) -> TokenFunction:
    """Return the model, or a part of it, as a function that keeps packed demonstrations apart."""
    if segments is None:
        return part
    cache = [_SegmentMask(segments)] * len(make_prompt_cache(model))
    return lambda inputs: part(inputs, cache=cache)


def check_packable(model: nn.Module) -> None:
    """Raise `ConfigError` if the model computes something else for packed demonstrations.

    Recurrent layers, learned positions and masks of the model's own are such cases. Two
    demonstrations are run in one row and alone, and the outputs are compared.
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
        f"{type(model).__name__} cannot be packed: a demonstration in a row would be influenced by "
        "the one before. Train without packing; batches are sorted by length in both cases"
    )


class _SegmentMask:
    """In place of a layer's KV cache: masks attention between the segments of a row."""

    offset = 0

    def __init__(self, segments: Int[mx.array, "batch time"]) -> None:
        self._segments = segments

    @property
    def state(self) -> list[mx.array]:
        return []

    @state.setter
    def state(self, state: list[mx.array]) -> None:
        # A forward pass does not change the segments, so there is no state.
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
