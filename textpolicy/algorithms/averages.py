"""From a loss for each token to the loss of a batch: what weighs how much.

All divide by totals of the whole optimizer batch, so that micro-batches add up.
"""

from collections.abc import Callable

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.ops import PerToken, masked_sum, row_means
from textpolicy.types import Batch

Average = Callable[[PerToken, Batch], Float[mx.array, ""]]


def sequence_mean(loss: PerToken, batch: Batch) -> Float[mx.array, ""]:
    """Each sequence's mean over its tokens, then the mean over sequences: GRPO's."""
    return row_means(loss, batch.mask).sum() / batch.rows


def sequence_sum(loss: PerToken, batch: Batch) -> Float[mx.array, ""]:
    """Each sequence's sum over its tokens, then the mean over sequences: LUSPO's."""
    return masked_sum(loss, batch.mask) / batch.rows


def token_mean(loss: PerToken, batch: Batch) -> Float[mx.array, ""]:
    """The mean over all tokens of the optimizer batch: DAPO's."""
    return masked_sum(loss, batch.mask) / batch.token_count


def longest_length(loss: PerToken, batch: Batch) -> Float[mx.array, ""]:
    """The sum over tokens, divided by the longest that an answer could be: Dr. GRPO's."""
    return sequence_sum(loss, batch) / batch.max_tokens


def constant_length(tokens: int) -> Average:
    """The sum over tokens, divided by a length that no answer changes."""
    return lambda loss, batch: sequence_sum(loss, batch) / tokens


def micro_batch_token_mean(loss: PerToken, batch: Batch) -> Float[mx.array, ""]:
    """The mean over the tokens of each micro-batch, weighted by its share of the rows.

    The one average that depends on how the batch is cut; other libraries call it `bnpo`.
    """
    tokens = mx.maximum(batch.mask.sum(), 1)
    return masked_sum(loss, batch.mask) / tokens * (batch.mask.shape[0] / batch.rows)
