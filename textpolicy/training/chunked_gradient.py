"""A function over the rows of an array, a chunk at a time, in both directions."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from textpolicy.fast_cpu.array_slices import compute_after
from textpolicy.training.softmax_logprobs import PositionLogprobs

Chunk = Callable[[slice, mx.array, Any], PositionLogprobs]
"""Scores of the rows at a place, from those rows and a tree of weights."""


def apply_in_chunks(
    function: Chunk, places: Sequence[slice]
) -> Callable[[mx.array, Any], PositionLogprobs]:
    """The function over all places, with a gradient that computes each place again.

    A place waits for the one before: mlx would otherwise start on many at once, and hold them all.
    """

    def forward(rows: mx.array, weights: Any) -> PositionLogprobs:
        parts: list[PositionLogprobs] = []
        for place in places:
            before = [*parts[-1]] if parts else []
            parts.append(function(place, compute_after(rows[place], before), weights))
        return mx.concatenate([p for p, _ in parts]), mx.concatenate([e for _, e in parts])

    def backward(primals: Any, cotangents: PositionLogprobs, _: PositionLogprobs) -> Any:
        rows, weights = primals
        flat: Any = tree_flatten(weights)
        names, arrays = [name for name, _ in flat], [array for _, array in flat]
        parts: list[mx.array] = []
        sums = [mx.zeros_like(array) for array in arrays]
        for place in places:

            def again(rows: mx.array, *arrays: mx.array, place: slice = place) -> Any:
                return function(place, rows, tree_unflatten([*zip(names, arrays, strict=True)]))

            inputs = [compute_after(rows[place], [*parts[-1:], *sums]), *arrays]
            slopes: Any = mx.vjp(again, inputs, [c[place] for c in cotangents])[1]
            part, *more = slopes
            parts.append(part)
            sums = [total + array for total, array in zip(sums, more, strict=True)]
        return mx.concatenate(parts), tree_unflatten([*zip(names, sums, strict=True)])

    run: Any = mx.custom_function(forward)
    run.vjp(backward)
    return run
