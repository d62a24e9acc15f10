"""The root-mean-square norm as one operation, with its gradient as one operation.

On a CPU, mlx computes the norm by seven operations. With n numbers in a row, the row's scale
s = 1 / sqrt(mean(x^2) + eps) and y = s w x:

    dx = s (w dy - x s^2 sum(w x dy) / n)        dw = sum over rows of s x dy
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float

from textpolicy.fast_cpu.gradients import are_gradients_needed, with_gradient
from textpolicy.fast_cpu.mlx_operations import bits_of, operation_for

Rows = Float[mx.array, "*rows width"]


class FastRMSNorm(nn.RMSNorm):
    """`nn.RMSNorm`, by compiled operations where there are any."""

    def __call__(self, x: Rows) -> Rows:
        weight = self["weight"]
        known = weight.dtype == mx.float32 and weight.shape == x.shape[-1:]
        compiled = operation_for("rms_norm", x, vectors=1, least_width=1) if known else None
        if compiled is None:
            return super().__call__(x)
        if are_gradients_needed():
            return _norm(self.eps)(x, weight)
        return compiled(x, weight, numbers=(bits_of(self.eps),))[0]


@cache
def _norm(eps: float) -> Callable[..., Rows]:
    """Return the norm of x and weights with this epsilon, with its gradient."""

    def value(x: Rows, weight: mx.array) -> Rows:
        compiled = operation_for("rms_norm", x, vectors=1, least_width=1)
        if compiled is None:
            return mx.fast.rms_norm(x, weight, eps)
        return compiled(x, weight, numbers=(bits_of(eps),))[0]

    def gradients(primals: Any, cotangent: Rows, _: Rows) -> list[mx.array]:
        x, weight = primals
        compiled = operation_for("rms_norm_gradient", x, cotangent, vectors=1, least_width=1)
        if compiled is None:
            return mx.vjp(partial(mx.fast.rms_norm, eps=eps), [x, weight], [cotangent])[1]
        (of_x,) = compiled(x, cotangent, weight, numbers=(bits_of(eps),))
        scale = mx.rsqrt(mx.square(x).mean(axis=-1, keepdims=True) + eps)
        # mlx computes this only if the weights are trained.
        of_weight = (cotangent * x * scale).reshape(-1, x.shape[-1]).sum(axis=0)
        return [of_x, of_weight]

    return with_gradient(value, gradients)
