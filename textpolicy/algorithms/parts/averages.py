"""Averages: from the loss of each token to the loss of the batch.

All but the last divide by totals of the optimizer batch, whatever the size of a micro-batch is. A
sequence is all that was sampled in one rollout, also if the rollout has several segments.
"""

from collections.abc import Callable

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.parts.reductions import PerToken, masked_sum, mean_of_sequences
from textpolicy.types import Batch

Average = Callable[[PerToken, Batch], Float[mx.array, ""]]


def sequence_mean(loss: PerToken, batch: Batch) -> Float[mx.array, ""]:
    """Return the mean over sequences of each sequence's mean over its tokens, as in GRPO."""
    return mean_of_sequences(loss, batch)


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
    """Return each micro-batch's mean over tokens, weighted by its sequences: TRL's `bnpo`."""
    tokens = mx.maximum(batch.mask.sum(), 1)
    sequences = batch.mask.shape[0] if batch.rollout is None else batch.rollout.max() + 1
    return masked_sum(loss, batch.mask) / tokens * (sequences / batch.rows)
