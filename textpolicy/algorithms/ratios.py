"""How much likelier a token, or its whole sequence, has become since it was sampled: in logs."""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.ops import PerToken, row_means
from textpolicy.types import Batch


class Ratio(NamedTuple):
    """Log-ratios, and whether each is of a sequence: shapes do not say it of a token's answer."""

    logs: PerToken
    by_sequence: bool


LogRatio = Callable[[Float[mx.array, "batch time"], Batch], Ratio]


def token_log_ratio(logp: Float[mx.array, "batch time"], batch: Batch) -> Ratio:
    """Of each token: log p(token) - log p_old(token); 0 outside the mask."""
    return Ratio(_of_tokens(logp, batch), by_sequence=False)


def sequence_log_ratio(logp: Float[mx.array, "batch time"], batch: Batch) -> Ratio:
    """Of each sequence, by its length: the mean of its tokens' log-ratios (GSPO, equation 7)."""
    means = row_means(_of_tokens(logp, batch), batch.mask)
    return Ratio(means[:, None], by_sequence=True)


def whole_sequence_log_ratio(logp: Float[mx.array, "batch time"], batch: Batch) -> Ratio:
    """Of each sequence as one action: the sum of its tokens' log-ratios."""
    return Ratio(_of_tokens(logp, batch).sum(axis=1, keepdims=True), by_sequence=True)


def _of_tokens(logp: Float[mx.array, "batch time"], batch: Batch) -> Float[mx.array, "batch time"]:
    return mx.where(batch.mask, logp - batch.logp_old, 0)
