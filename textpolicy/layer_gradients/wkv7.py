"""The recurrence of RWKV-7, with a backward pass in memory that grows linearly with length."""

from typing import Any

import mlx.core as mx
from jaxtyping import Float

from textpolicy.layer_gradients.recurrence import run_recurrence

Steps = Float[mx.array, "batch time heads width"]
SquareState = Float[mx.array, "batch heads width width"]

# Steps whose intermediate states are in memory at once.
_STEPS = 32


def wkv7(
    layer: Any,
    r: Steps,
    w: Steps,
    k: Steps,
    v: Steps,
    a: Steps,
    b: Steps,
    state: SquareState | None,
) -> tuple[Steps, SquareState]:
    """Return the outputs of all steps and the last state, as mlx-lm's method `_wkv7` does.

    The backward pass keeps one state for each few steps, and computes the steps between again.
    """
    batch, _, heads, width = r.shape
    if state is None:
        state = mx.zeros((batch, heads, width, width), dtype=r.dtype)
    return run_recurrence(_run_steps, (r, w, k, v, a, b), state, _STEPS)


def _run_steps(*arrays: mx.array) -> tuple[mx.array, mx.array]:
    *inputs, state = arrays
    outputs: list[mx.array] = []
    for step in range(inputs[0].shape[1]):
        r, w, k, v, a, b = (array[:, step, :, :, None] for array in inputs)
        row = lambda column: column.swapaxes(-1, -2)  # noqa: E731
        state = state * row(w) + v @ row(k) + (state @ a) @ row(b)
        outputs.append((state @ r).squeeze(-1))
    return mx.stack(outputs, axis=1).astype(inputs[0].dtype), state
