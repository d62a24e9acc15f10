"""One decode step: the model reads the last tokens, and each row draws its next token."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float

from textpolicy.fast_cpu.gradients import without_gradients
from textpolicy.fast_cpu.rotary import one_step
from textpolicy.generation.decoding_batch import (
    DecodingBatch,
    DecodingRow,
    DrawnDetails,
    DrawnTokens,
    TokenDetails,
)
from textpolicy.generation.sampling import (
    NEXT_KEY,
    draw_by_plan,
    likeliest_tokens,
    penalise_repetition,
)

_PENALISED_TOKENS = 20
"""The number of last tokens that mlx-lm's repetition penalty reads."""


def logits_by_model(model: nn.Module, batch: DecodingBatch) -> Float[mx.array, "rows vocab"]:
    """Return the logits after the last tokens, which enter the KV cache."""
    with one_step(batch.positions), without_gradients():
        return model(batch.last_tokens[:, None], cache=batch.cache)[:, -1, :]


def launch_step(model: nn.Module, batch: DecodingBatch) -> DrawnTokens:
    """Start one decode step on the device; return what it draws."""
    raw = logits = logits_by_model(model, batch).astype(mx.float32)
    if batch.plan.penalises:
        contexts = [(row.context + row.tokens)[-_PENALISED_TOKENS:] for row in batch.rows]
        penalties = [row.sampling.repetition_penalty for row in batch.rows]
        logits = penalise_repetition(logits, contexts, penalties)
    with without_gradients():
        drawn = DrawnTokens(*draw_by_plan(logits, mx.array(batch.keys), batch.plan))
    drawn.details = _launch_details(batch.rows, raw, drawn.tokens)
    mx.async_eval((drawn.tokens, drawn.logprobs), [layer.state for layer in batch.cache])
    batch.last_tokens = drawn.tokens
    batch.keys = batch.keys + NEXT_KEY
    return drawn


def _launch_details(
    rows: Sequence[DecodingRow], logits: mx.array, tokens: mx.array
) -> Sequence[DrawnDetails]:
    """Return the model's own log-probabilities of the rows that ask for them."""
    asking = [(index, row) for index, row in enumerate(rows) if row.top_logprobs is not None]
    if not asking:
        return ()
    index = mx.array([index for index, _ in asking])
    number = max(row.top_logprobs or 0 for _, row in asking)
    arrays = likeliest_tokens(logits[index], tokens[index], number)
    mx.async_eval(arrays)
    return [DrawnDetails([row for _, row in asking], *arrays)]


def record_details(details: Sequence[DrawnDetails]) -> None:
    """Append what the model says of the drawn tokens to the rows that have not ended."""
    for drawn in details:
        arrays = (drawn.logprobs, drawn.top_tokens, drawn.top_logprobs)
        columns = zip(drawn.rows, *map(np.array, arrays), strict=True)
        for row, logprob, tokens, others in columns:
            if row.stop_reason is None:
                pairs = zip(tokens.tolist(), others.tolist(), strict=True)
                row.details.append(TokenDetails(float(logprob), [*pairs][: row.top_logprobs]))
