"""The end of every policy loss: from the loss of each token to the loss of the batch.

    loss = average(weight_1 * ... * weight_k * token loss + beta * KL) - entropy_bonus * entropy

The KL divergence is that from the reference; the entropy is the mean over all tokens. Clipped
losses have a bound for tokens with A < 0, whose ratio the clip does not limit. Two papers name it:

    delta       surrogate >= delta * A      INTELLECT-2, arXiv:2505.07291, 3.4: two-sided clipping
    dual_clip   surrogate >= dual_clip * A  Ye et al. 2020, arXiv:1912.09729, equation 5

Both are numbers above 1 + clip_high, as in the papers.
"""

from collections.abc import Callable, Sequence
from typing import TypedDict

import mlx.core as mx
from jaxtyping import Bool, Float

from textpolicy.algorithms.parts.averages import Average, token_mean
from textpolicy.algorithms.parts.kl import KLEstimator, LogDistance, k3
from textpolicy.algorithms.parts.ratio_levels import RatioLevel
from textpolicy.algorithms.parts.reductions import (
    PerToken,
    add_segments,
    flagged_share,
    sequence_means,
)
from textpolicy.errors import ConfigError
from textpolicy.types import Batch

Loss = tuple[Float[mx.array, ""], dict[str, mx.array]]
"""The number to minimise, and metrics."""
TokenWeight = Callable[[Float[mx.array, "batch time"], Batch], tuple[PerToken, dict[str, mx.array]]]
"""From log-probabilities and batch to a factor for each token's loss, and metrics."""


class LossOptions(TypedDict, total=False):
    """The options of every policy loss, which `compose_loss` takes."""

    weights: Sequence[TokenWeight]
    beta: float
    kl: KLEstimator
    entropy_bonus: float


class ClippedOptions(LossOptions, total=False):
    """The options of every clipped policy loss."""

    delta: float | None
    dual_clip: float | None


def compose_loss(
    token_loss: PerToken,
    logp: Float[mx.array, "batch time"],
    batch: Batch,
    ratio: PerToken,
    average: Average,
    metrics: dict[str, mx.array] | None = None,
    *,
    delta: float | None = None,
    dual_clip: float | None = None,
    weights: Sequence[TokenWeight] = (),
    beta: float = 0.0,
    kl: KLEstimator = k3,
    entropy_bonus: float = 0.0,
) -> Loss:
    """Return the loss of the batch and its metrics; `token_loss` is the negated surrogate."""
    metrics = metrics or {}
    for bound in (delta, dual_clip):
        if bound is not None:
            limit = mx.where(batch.advantages < 0, -bound * batch.advantages, mx.inf)
            token_loss = mx.minimum(token_loss, limit)
    for weight in weights:
        factor, more = weight(logp, batch)
        token_loss, metrics = token_loss * mx.stop_gradient(factor), metrics | more
    if beta:
        token_loss = token_loss + beta * kl(_log_distance(logp, batch), ratio)
    loss = average(token_loss, batch)
    metrics = metrics | {"policy_loss": loss}
    if entropy_bonus:
        loss = loss - entropy_bonus * _mean_entropy(batch)
    return loss, metrics


def clip_metrics(
    ratio: PerToken, batch: Batch, clip_low: float, clip_high: float, level: RatioLevel
) -> dict[str, mx.array]:
    """Return the shares of tokens, or of sequences, at which a clip stops the gradient."""
    low = (ratio < 1 - clip_low) & (batch.advantages < 0)
    high = (ratio > 1 + clip_high) & (batch.advantages > 0)
    by_sequence = level.by_sequence
    return {
        "clip_ratio/low_mean": flagged_share(low, batch, by_sequence),
        "clip_ratio/low_min": _row_shares(low, batch, mx.inf).min(),
        "clip_ratio/high_mean": flagged_share(high, batch, by_sequence),
        "clip_ratio/high_max": _row_shares(high, batch, 0.0).max(),
        "clip_ratio/region_mean": flagged_share(low | high, batch, by_sequence),
    }


def _row_shares(
    flags: Bool[mx.array, "batch _"], batch: Batch, if_empty: float
) -> Float[mx.array, " batch"]:
    shares = sequence_means(flags.astype(mx.float32), batch)
    counted = add_segments(batch.mask.sum(axis=1), batch) > 0
    # All shares are 0 in a batch without counted tokens.
    return mx.where(counted | ~counted.any(), shares, if_empty)


def _log_distance(logp: Float[mx.array, "batch time"], batch: Batch) -> LogDistance:
    """Return log p_ref - log p at each token, clipped because KL estimates take its exponential."""
    if batch.logp_ref is None:
        raise ConfigError(
            "the loss has a KL term and the batch has no log-probabilities of a reference; give "
            "the trainer one with Trainer(..., reference='base'), or set beta to 0"
        )
    return mx.clip(mx.where(batch.mask, batch.logp_ref - logp, 0), -20, 20)


def _mean_entropy(batch: Batch) -> Float[mx.array, ""]:
    if batch.entropy is None:
        raise ConfigError(
            "the loss has an entropy bonus and the batch has no entropy; train with a Trainer, or "
            "set Batch.entropy to the entropy of the current policy"
        )
    return token_mean(batch.entropy, batch)
