"""Exponentials and the softmax, faster than mlx's on a CPU. Only the softmax has a gradient.

mlx's exponential for CPUs calls a function for every multiplication of its polynomial. A compiled
function uses the processor's vector instructions. Without a compiler, operations on whole arrays
use them, and compute a polynomial in a third of mlx's time (benchmarks/functions.py). A small array
takes less time than these operations take to begin, so mlx's exponential computes it.
"""

import math

import mlx.core as mx
from jaxtyping import Float

from textpolicy.fast_cpu.array_slices import apply_in_slices
from textpolicy.fast_cpu.gradients import with_gradient
from textpolicy.fast_cpu.mlx_operations import operation_for

LOG2_E = math.log2(math.e)
SMALL = 2**13
"""Arrays of so many numbers or fewer are small."""
# 2^f as 1 + f (c1 + f (c2 + ...)) for -1/2 <= f <= 1/2, from c5 down to 1: the polynomial of this
# degree with the smallest relative error, 9e-8.
_POLYNOMIAL = (
    0.0013264715118813733,
    0.009671512775090447,
    0.055507337731949824,
    0.24022242083722486,
    0.6931469775865392,
    1.0,
)
# Adding this to a float32 leaves in the last bits the nearest whole number plus 127. A float32
# stores an exponent of 0 as 127.
_ROUND = 1.5 * 2**23 + 127


def exp(x: Float[mx.array, "*shape"]) -> Float[mx.array, "*shape"]:
    """Return e^x in float32, as exactly as `mx.exp`; infinite from about 88 on."""
    if compiled := operation_for("exp", x):
        return compiled(x)[0]
    if mx.default_device().type == mx.gpu or x.size <= SMALL:
        return mx.exp(x)
    return exp2(mx.minimum(x * LOG2_E, 128.0))


def exp2(x: Float[mx.array, "*shape"]) -> Float[mx.array, "*shape"]:
    """Return 2^x in float32 for x up to 127, and 0 for a subnormal result of a large array."""
    if compiled := operation_for("exp2", x):
        return compiled(x)[0]
    if x.size <= SMALL:
        return mx.exp(x * math.log(2))
    return apply_in_slices(lambda x: [_exp2(x)], x)[0]


def softmax(x: Float[mx.array, "*shape"]) -> Float[mx.array, "*shape"]:
    """Return the softmax over the last axis."""
    return _softmax(x)


def _softmax_value(x: mx.array) -> mx.array:
    compiled = operation_for("softmax", x, least_width=1)
    return compiled(x)[0] if compiled else mx.softmax(x, axis=-1)


def _softmax_gradient(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return output * (cotangent - (cotangent * output).sum(axis=-1, keepdims=True))


_softmax = with_gradient(_softmax_value, _softmax_gradient)


def _exp2(x: mx.array) -> mx.array:
    x = mx.maximum(x, -127.0)
    rounded = x + _ROUND
    fraction = x - (rounded - _ROUND)
    y, *rest = _POLYNOMIAL
    for coefficient in rest:
        y = y * fraction + coefficient
    # Shift the whole number to the bits of a float32's exponent; there, 0 makes the number 0.
    return y * mx.view(mx.left_shift(mx.view(rounded, mx.int32), 23), mx.float32)
