"""Functions of large arrays, applied to one slice at a time.

A slice fits into the processor's caches, and temporary arrays have the size of a slice.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx

SLICE_SIZE = 2**18  # Numbers in a slice: 1 MB in float32.


def compute_after(x: mx.array, others: Sequence[mx.array]) -> mx.array:
    """Return x, to be computed after the other arrays.

    Without this order, mlx starts on many slices at once and holds the temporary arrays of all.
    """
    return mx.depends([x], [*others])[0] if others else x


def apply_in_slices(function: Callable[..., list[mx.array]], *arrays: mx.array) -> list[mx.array]:
    """Return the results of an elementwise function of arrays of one shape, in that shape."""
    size, shape = arrays[0].size, arrays[0].shape
    if size <= SLICE_SIZE:
        return function(*arrays)
    flat = [x.flatten() for x in arrays]
    done: list[list[mx.array]] = []
    for start in range(0, size, SLICE_SIZE):
        first, *others = (x[start : start + SLICE_SIZE] for x in flat)
        done.append(function(compute_after(first, done[-1] if done else ()), *others))
    return [mx.concatenate([*parts]).reshape(shape) for parts in zip(*done, strict=True)]
