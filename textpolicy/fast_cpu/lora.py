"""A linear layer with LoRA as one operation, with its gradients as one operation, on a Linux CPU.

As operations of mlx, the update of a layer takes as long to begin in a decode step as it takes to
compute, and in training it is written and read several times.
"""

from typing import Any

import mlx.core as mx
from jaxtyping import Float

from textpolicy.fast_cpu.gradients import with_gradient
from textpolicy.fast_cpu.mlx_operations import compiled_operation, reason_of_none

_Rows = Float[mx.array, "rows inputs"]


def lora_linear(
    x: _Rows,
    weight: Float[mx.array, "outputs inputs"],
    bias: Float[mx.array, " outputs"] | None,
    a: Float[mx.array, "inputs rank"],
    b: Float[mx.array, "rank outputs"],
    scale: Float[mx.array, ""],
) -> Float[mx.array, "rows outputs"] | None:
    """Return x W' + bias + scale (x A) B, or None where no compiled function computes it."""
    if mx.default_device().type != mx.cpu or not x.size or reason_of_none():
        return None
    arrays = [x, weight, a, b, scale, *([] if bias is None else [bias])]
    if any(one.dtype != mx.float32 for one in arrays):
        return None
    return _layer(*arrays)


def _value(*arrays: mx.array) -> mx.array:
    x, weight, a, _, _, *bias = arrays
    operation = compiled_operation("lora", len(arrays))
    rows, outputs = len(x), len(weight)
    return operation(arrays, [(rows, outputs)], (rows, *weight.shape[::-1], a.shape[1], len(bias)))[
        0
    ]


def _gradients(primals: Any, cotangent: mx.array, _: mx.array) -> list[mx.array]:
    x, weight, a, b, scale, *bias = primals
    rows, rank = len(x), a.shape[1]
    operation = compiled_operation("lora_gradients", 6, 4)
    of_x, of_a, of_b, _ = operation(
        (x, weight, a, b, scale, cotangent),
        [x.shape, a.shape, b.shape, (rows, rank)],
        (rows, *weight.shape[::-1], rank),
    )
    # mlx computes these only if the layer under the adapter is trained.
    of_weight = cotangent.T @ x
    of_scale = (cotangent * ((x @ a) @ b)).sum()
    return [of_x, of_weight, of_a, of_b, of_scale, *[cotangent.sum(axis=0)] * len(bias)]


_layer = with_gradient(_value, _gradients)
