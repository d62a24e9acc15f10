"""Large arrays a piece at a time: in the processor's caches, with little memory beside them."""

from collections.abc import Callable, Sequence

import mlx.core as mx

# So many numbers each: 1 MB in float32.
SLICE_SIZE = 2**18


def compute_after(x: mx.array, others: Sequence[mx.array]) -> mx.array:
    """x, once the others are computed: mlx would otherwise begin on many pieces, and hold all."""
    return mx.depends([x], [*others])[0] if others else x


def apply_in_slices(function: Callable[..., list[mx.array]], *arrays: mx.array) -> list[mx.array]:
    """What the function makes of each number, from arrays of one shape, in arrays of that shape."""
    size, shape = arrays[0].size, arrays[0].shape
    if size <= SLICE_SIZE:
        return function(*arrays)
    flat = [x.flatten() for x in arrays]
    done: list[list[mx.array]] = []
    for at in range(0, size, SLICE_SIZE):
        first, *others = (x[at : at + SLICE_SIZE] for x in flat)
        done.append(function(compute_after(first, done[-1] if done else ()), *others))
    return [mx.concatenate([*parts]).reshape(shape) for parts in zip(*done, strict=True)]
