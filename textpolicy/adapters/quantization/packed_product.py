"""Products with frozen packed weights: unpacked for the product, and again for the gradient.

Left to automatic differentiation, every float weight of a model would wait in memory for the
backward pass, and packing would have saved nothing.
"""

from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx

Unpack = Callable[..., mx.array]
Product = Callable[..., mx.array]


def make_packed_product(unpack: Unpack) -> Product:
    """A function of x and the arrays that `unpack` makes an outputs x inputs matrix of.

    The product is computed in float32 or in the dtype of `x`, whichever `unpack` returns; only `x`
    gets a gradient.
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
    return cast(Product, product)
