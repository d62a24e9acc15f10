"""Products with weights of 4 bits on a CPU, for few rows from the form in which they are stored.

The time of a decode step is mostly that of reading the weights. To unpack them first, as a product
of many rows does, a CPU writes and reads each weight as 32 bits. A compiled function unpacks them
where that is needed, with vector instructions and all threads, which mlx does not use for it.
"""

from math import prod

import mlx.core as mx

from textpolicy.fast_cpu.mlx_operations import operation, reason_of_none

MOST_ROWS = 64
"""With more rows, it is faster to unpack the weights first (`benchmarks/products.py`)."""
_BITS, _PER_WORD, _GROUP_SIZES = 4, 8, (32, 64, 128)


def reads_packed(mode: str, bits: int, group_size: int, inputs: int) -> bool:
    """Return whether compiled functions read weights of this format on this machine."""
    if mode not in ("affine", "nf4") or bits != _BITS or mx.default_device().type != mx.cpu:
        return False
    fits = inputs % _PER_WORD == 0 and group_size in (*_GROUP_SIZES, inputs)
    return fits and not reason_of_none()


def packed_product(
    mode: str, bits: int, x: mx.array, weight: mx.array, *groups: mx.array
) -> mx.array | None:
    """Return x times the transpose of a packed matrix, or None where no function computes it.

    `groups` are the scales of the weights, and their biases if they have biases. Only products of
    few rows of float32 numbers are computed. There is no gradient.
    """
    inputs, rows = x.shape[-1], prod(x.shape[:-1])
    if x.dtype != mx.float32 or not 0 < rows <= MOST_ROWS:
        return None
    if not _can_read(mode, bits, inputs, weight, groups):
        return None
    outputs, count = groups[0].shape
    shape, numbers = (*x.shape[:-1], outputs), (rows, outputs, inputs, count)
    return operation(mode, 2 + len(groups))([x, weight, *groups], shape, numbers)[0]


def unpacked_weights(mode: str, bits: int, weight: mx.array, *groups: mx.array) -> mx.array | None:
    """Return a packed matrix as float32 numbers, or None where no function unpacks it."""
    inputs = weight.shape[-1] * weight.itemsize * 8 // bits
    if not _can_read(mode, bits, inputs, weight, groups):
        return None
    outputs, count = groups[0].shape
    unpack = operation(f"unpack_{mode}", 1 + len(groups))
    return unpack([weight, *groups], (outputs, inputs), (outputs, inputs, count))[0]


def _can_read(
    mode: str, bits: int, inputs: int, weight: mx.array, groups: tuple[mx.array, ...]
) -> bool:
    if weight.ndim != 2 or any(one.dtype != mx.float32 for one in groups):
        return False
    return reads_packed(mode, bits, inputs // groups[0].shape[-1], inputs)
