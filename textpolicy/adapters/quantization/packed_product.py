"""Unpacking mlx's quantized weights, and products that unpack frozen weights twice.

A product unpacks its weight for the forward pass and again for the gradient.

With automatic differentiation, the unpacked weights of the whole model would stay in memory until
the backward pass, and packing would save nothing.
"""

from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx

PackedProduct = Callable[..., mx.array]


def make_packed_product(unpack: Callable[..., mx.array]) -> PackedProduct:
    """Return a function of x and of the arrays that `unpack` makes an outputs x inputs matrix of.

    The function multiplies in the dtype that `unpack` returns. Only x gets a gradient.
    """

    def forward(x: mx.array, *packed: mx.array) -> mx.array:
        weight = unpack(*packed)
        return (x.astype(weight.dtype) @ weight.T).astype(x.dtype)

    def backward(primals: Any, cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
        x, *packed = primals
        weight = unpack(*packed)
        gradient = (cotangent.astype(weight.dtype) @ weight).astype(x.dtype)
        return (gradient, *(mx.zeros_like(array) for array in packed))

    product = mx.custom_function(forward)
    cast(Any, product).vjp(backward)
    return cast(PackedProduct, product)


def unpack_quantized(
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None = None,
    *,
    group_size: int,
    bits: int,
    mode: str,
) -> mx.array:
    """Return the float32 weights that arrays of one of mlx's quantization modes stand for."""
    return mx.dequantize(
        weight,
        # With dtype=float32 alone, mlx would still round to the dtype of scales and biases.
        scales.astype(mx.float32) if mode == "affine" else scales,
        None if biases is None else biases.astype(mx.float32),
        group_size=group_size,
        bits=bits,
        mode=mode,
        dtype=mx.float32,
    )
