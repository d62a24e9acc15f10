"""The update of a LoRA layer in a decode step, as one operation.

mlx computes it by five operations on a few numbers, which take longer to begin than to run.
"""

import mlx.core as mx
from jaxtyping import Float

from textpolicy.fast_cpu.gradients import gradients_are_needed
from textpolicy.fast_cpu.mlx_operations import compiled_operation, reason_of_none
from textpolicy.fast_cpu.packed_weights import MOST_ROWS

_LARGEST_RANK = 256


def add_low_rank(
    y: Float[mx.array, "rows out"],
    x: Float[mx.array, "rows in"],
    a: Float[mx.array, "in rank"],
    b: Float[mx.array, "rank out"],
    scale: Float[mx.array, ""],
) -> Float[mx.array, "rows out"] | None:
    """Return y + scale x A B, or None where no compiled function computes it.

    It has no gradient, so there is none where gradients are needed, and none for many rows, whose
    products are faster by themselves.
    """
    (rows, inputs), (rank, outputs) = x.shape, b.shape
    if gradients_are_needed() or not 0 < rows <= MOST_ROWS or rank > _LARGEST_RANK:
        return None
    if any(one.dtype != mx.float32 for one in (y, x, a, b, scale)):
        return None
    if mx.default_device().type != mx.cpu or reason_of_none():
        return None
    numbers = (rows, inputs, outputs, rank)
    return compiled_operation("add_low_rank", 5)([y, x, a, b, scale], y.shape, numbers)[0]
