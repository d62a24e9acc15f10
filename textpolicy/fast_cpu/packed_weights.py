"""Products with weights of few bits on a CPU.

The time of a decode step is mostly that of reading the weights. To unpack them first, as a product
of many rows does, a CPU writes and reads each weight as 32 bits. So few rows are multiplied with
weights of 4 or 8 bits in the form in which they are stored. For other products, compiled functions
unpack the weights with vector instructions and all threads, unlike those of mlx.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import mlx.core as mx

from textpolicy.fast_cpu.mlx_operations import compiled_operation, reason_of_none

MOST_ROWS = 64
"""With more rows, the weights are unpacked first. With 32 to 64 rows, both take about as long."""
# In `loops.h`, formats have these numbers; floats have 0.
_PRODUCTS = {("affine", 4): 1, ("affine", 8): 2, ("nf4", 4): 3}
_UNPACKED = {*_PRODUCTS, *(("affine", bits) for bits in (2, 3, 5, 6))}
_GROUP_ARRAYS = {"affine": 2, "nf4": 1}
_TOGETHER, _GROUP_SIZES = 8, (32, 64, 128)


def multiplies_packed(mode: str, bits: int, group_size: int, inputs: int) -> bool:
    """Return whether `packed_product` takes few rows with weights of this format here."""
    return (mode, bits) in _PRODUCTS and _are_readable(group_size, inputs)


def unpacks(mode: str, bits: int, group_size: int, inputs: int) -> bool:
    """Return whether `unpacked_weights` takes float32 scales and weights of this format here."""
    return (mode, bits) in _UNPACKED and _are_readable(group_size, inputs)


class PackedMatrix(NamedTuple):
    """A matrix that compiled functions multiply with as it is stored.

    The arrays are its codes and scales, and its biases if the format has some.
    """

    arrays: list[mx.array]
    inputs: int
    groups: int
    format: int

    @classmethod
    def of(
        cls, mode: str, bits: int, inputs: int, weight: mx.array, *groups: mx.array
    ) -> "PackedMatrix | None":
        """Return the matrix, or None where no function multiplies with it."""
        if (mode, bits) not in _PRODUCTS or not _can_read(mode, bits, inputs, weight, groups):
            return None
        return cls([weight, *groups], inputs, groups[0].shape[1], _PRODUCTS[mode, bits])


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
    matrix = PackedMatrix.of(mode, bits, inputs, weight, *groups)
    if matrix is None:
        return None
    outputs = len(weight)
    product = compiled_operation("packed_product", 2 + len(groups))
    numbers = rows, outputs, inputs, matrix.groups, matrix.format
    return product([x, *matrix.arrays], [(*x.shape[:-1], outputs)], numbers)[0]


def unpacked_weights(mode: str, bits: int, weight: mx.array, *groups: mx.array) -> mx.array | None:
    """Return a packed matrix as float32 numbers, or None where no function unpacks it."""
    inputs = weight.shape[-1] * weight.itemsize * 8 // bits
    if (mode, bits) not in _UNPACKED or not _can_read(mode, bits, inputs, weight, groups):
        return None
    outputs, count = groups[0].shape
    unpack = compiled_operation(f"unpack_{mode}_{bits}", 1 + len(groups))
    return unpack([weight, *groups], [(outputs, inputs)], (outputs, inputs, count))[0]


def _can_read(
    mode: str, bits: int, inputs: int, weight: mx.array, groups: Sequence[mx.array]
) -> bool:
    """Return whether the arrays fit together as the functions trust them to, and are readable."""
    if weight.ndim != 2 or len(groups) != _GROUP_ARRAYS[mode]:
        return False
    (outputs, _), count = weight.shape, groups[0].shape[-1]
    if any(one.dtype != mx.float32 or one.shape != (outputs, count) for one in groups):
        return False
    if weight.nbytes * 8 != outputs * inputs * bits or not count or inputs % count:
        return False
    return _are_readable(inputs // count, inputs)


def _are_readable(group_size: int, inputs: int) -> bool:
    if mx.default_device().type != mx.cpu or inputs % _TOGETHER:
        return False
    return group_size in (*_GROUP_SIZES, inputs) and not reason_of_none()
