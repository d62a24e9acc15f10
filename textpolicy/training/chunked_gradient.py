"""A function of many rows, computed in chunks of rows in the forward and the backward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from textpolicy.fast_cpu.array_slices import compute_after
from textpolicy.training.softmax_logprobs import PositionLogprobs

ChunkFunction = Callable[[slice, mx.array, Any], PositionLogprobs]
"""Takes the slice of a chunk, the rows of this slice, and a tree of weights."""


def apply_in_chunks(
    function: ChunkFunction, chunks: Sequence[slice]
) -> Callable[[mx.array, Any], PositionLogprobs]:
    """Return a function of all rows and the weights that computes one chunk after another.

    The backward pass computes each chunk again. Each chunk waits for the previous one, because mlx
    would otherwise start on many chunks at once and hold all of them in memory.
    """

    def forward(rows: mx.array, weights: Any) -> PositionLogprobs:
        parts: list[PositionLogprobs] = []
        for chunk in chunks:
            previous = [*parts[-1]] if parts else []
            parts.append(function(chunk, compute_after(rows[chunk], previous), weights))
        return join_chunks(parts)

    def backward(primals: Any, cotangents: PositionLogprobs, _: PositionLogprobs) -> Any:
        rows, weights = primals
        flat: Any = tree_flatten(weights)
        names, arrays = [name for name, _ in flat], [array for _, array in flat]
        parts: list[mx.array] = []
        sums = [mx.zeros_like(array) for array in arrays]
        for chunk in chunks:

            def compute(rows: mx.array, *arrays: mx.array, chunk: slice = chunk) -> Any:
                return function(chunk, rows, tree_unflatten([*zip(names, arrays, strict=True)]))

            inputs = [compute_after(rows[chunk], [*parts[-1:], *sums]), *arrays]
            gradients: Any = mx.vjp(compute, inputs, [c[chunk] for c in cotangents])[1]
            of_rows, *of_weights = gradients
            parts.append(of_rows)
            sums = [total + array for total, array in zip(sums, of_weights, strict=True)]
        return mx.concatenate(parts), tree_unflatten([*zip(names, sums, strict=True)])

    run: Any = mx.custom_function(forward)
    run.vjp(backward)
    return run


def join_chunks(parts: Sequence[tuple[mx.array, mx.array]]) -> PositionLogprobs:
    """Return the log-probabilities and the entropies of all chunks."""
    return mx.concatenate([logp for logp, _ in parts]), mx.concatenate([h for _, h in parts])
