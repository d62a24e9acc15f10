"""How much likelier a token, or its whole sequence, has become since it was sampled: in logs."""

from collections.abc import Callable

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.ops import PerToken, row_means
from textpolicy.types import Batch

LogRatio = Callable[[Float[mx.array, "batch time"], Batch], PerToken]


def token_log_ratio(
    logp: Float[mx.array, "batch time"], batch: Batch
) -> Float[mx.array, "batch time"]:
    """Of each token: log p(token) - log p_old(token); 0 outside the mask."""
    return mx.where(batch.mask, logp - batch.logp_old, 0)


def sequence_log_ratio(
    logp: Float[mx.array, "batch time"], batch: Batch
) -> Float[mx.array, "batch 1"]:
    """Of each sequence, by its length: the mean of its tokens' log-ratios (GSPO, equation 7)."""
    return row_means(token_log_ratio(logp, batch), batch.mask)[:, None]


def whole_sequence_log_ratio(
    logp: Float[mx.array, "batch time"], batch: Batch
) -> Float[mx.array, "batch 1"]:
    """Of each sequence as one action: the sum of its tokens' log-ratios."""
    return token_log_ratio(logp, batch).sum(axis=1, keepdims=True)
