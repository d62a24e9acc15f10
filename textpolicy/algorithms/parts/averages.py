"""Averages: from the loss of each token to the loss of the batch.

All but the last divide by totals of the optimizer batch, whatever the size of a micro-batch is.
"""

from collections.abc import Callable

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.parts.reductions import PerToken, masked_sum, row_means
from textpolicy.types import Batch

Average = Callable[[PerToken, Batch], Float[mx.array, ""]]


def sequence_mean(loss: PerToken, batch: Batch) -> Float[mx.array, ""]:
    """Return the mean over sequences of each sequence's mean over its tokens, as in GRPO."""
    return row_means(loss, batch.mask).sum() / batch.rows


def sequence_sum(loss: PerToken, batch: Batch) -> Float[mx.array, ""]:
    """Return the mean over sequences of each sequence's sum over its tokens, as in LUSPO."""
    return masked_sum(loss, batch.mask) / batch.rows


def token_mean(loss: PerToken, batch: Batch) -> Float[mx.array, ""]:
    """Return the mean over all tokens of the optimizer batch, as in DAPO."""
    return masked_sum(loss, batch.mask) / batch.token_count


def length_limit(loss: PerToken, batch: Batch) -> Float[mx.array, ""]:
    """Return `sequence_sum` divided by the largest allowed completion length, as in Dr. GRPO."""
    return sequence_sum(loss, batch) / batch.max_tokens


def constant(loss: PerToken, batch: Batch, *, tokens: int) -> Float[mx.array, ""]:
    """Return `sequence_sum` divided by `tokens`, a length that you choose."""
    return sequence_sum(loss, batch) / tokens


def micro_batch_token_mean(loss: PerToken, batch: Batch) -> Float[mx.array, ""]:
    """Return the mean over the tokens of each micro-batch, weighted by its rows: TRL's `bnpo`."""
    tokens = mx.maximum(batch.mask.sum(), 1)
    return masked_sum(loss, batch.mask) / tokens * (batch.mask.shape[0] / batch.rows)
