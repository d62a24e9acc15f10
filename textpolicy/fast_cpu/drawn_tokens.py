"""Drawing a token for each row as one operation, on a Linux CPU.

As operations of mlx, a draw has some thirty nodes, which read and write arrays as large as the
logits.
"""

import mlx.core as mx
from jaxtyping import Float, UInt32

from textpolicy.fast_cpu.gradients import are_gradients_needed
from textpolicy.fast_cpu.mlx_operations import compiled_operation, reason_of_none


def drawn_tokens(
    logits: Float[mx.array, "rows vocab"], keys: UInt32[mx.array, "rows 2"]
) -> tuple[UInt32[mx.array, " rows"], Float[mx.array, " rows"]] | None:
    """Return a token of softmax(logits) for each row's key, and its log-probability.

    Return None where no compiled function draws. The uniform numbers are those of `mx.random`.
    """
    if mx.default_device().type != mx.cpu or are_gradients_needed() or reason_of_none():
        return None
    if logits.dtype != mx.float32 or not logits.size:
        return None
    if keys.dtype != mx.uint32 or keys.shape != (len(logits), 2):
        return None
    shape = logits.shape[:1]
    tokens, logprobs = compiled_operation("drawn_tokens", 2, 2)(
        (logits, keys), [shape, shape], logits.shape
    )
    return tokens.view(mx.uint32), logprobs
