"""Exponentials of an array, where mlx is asked for no gradient of them.

mlx's own exponential for CPUs calls a function for every multiplication of its polynomial. Plain
operations on whole arrays use the processor's vectors, and all of them together take a third of
that time (benchmarks/functions.py).
"""

import math

import mlx.core as mx
from jaxtyping import Float

from textpolicy.fast_cpu.array_slices import apply_in_slices

LOG2_E = math.log2(math.e)
# 2^f as 1 + f (c1 + f (c2 + ...)) for -1/2 <= f <= 1/2, from c5 down to 1: of all polynomials of
# that degree the one with the smallest relative error, 9e-8.
_POLYNOMIAL = (
    0.0013264715118813733,
    0.009671512775090447,
    0.055507337731949824,
    0.24022242083722486,
    0.6931469775865392,
    1.0,
)
# Added to a float32, this leaves in its last bits the nearest whole number and, on top of that,
# the 127 which is the exponent of 1.
_ROUND = 1.5 * 2**23 + 127


def exp(x: Float[mx.array, "*shape"]) -> Float[mx.array, "*shape"]:
    """`mx.exp` of float32, as exact; infinite from 88.4 on, where `mx.exp` is from 88.7 on."""
    if mx.default_device().type == mx.gpu:
        return mx.exp(x)
    return exp2(mx.minimum(x * LOG2_E, 128.0))


def exp2(x: Float[mx.array, "*shape"]) -> Float[mx.array, "*shape"]:
    """2^x of float32 up to 128; 0 where a float32 has not all its digits any more."""
    return apply_in_slices(lambda x: [_exp2(x)], x)[0]


def _exp2(x: mx.array) -> mx.array:
    x = mx.maximum(x, -127.0)
    rounded = x + _ROUND
    fraction = x - (rounded - _ROUND)
    y, *rest = _POLYNOMIAL
    for coefficient in rest:
        y = y * fraction + coefficient
    # The whole number, moved to where a float32 has its exponent: 0 is that of the number 0.
    return y * mx.view(mx.left_shift(mx.view(rounded, mx.int32), 23), mx.float32)
