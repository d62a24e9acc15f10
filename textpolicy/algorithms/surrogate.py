"""The clipped objective of PPO: Schulman et al. 2017, arXiv:1707.06347, equation 7.

    L_t = min(ratio_t A_t, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_t)

Two bounds can be added, for tokens with A < 0, whose L_t is not bounded above:

    delta       min(ratio_t, delta) takes the place of ratio_t in the unclipped branch
                (INTELLECT-2, arXiv:2505.07291, 3.4: two-sided clipping)
    dual_clip   max(L_t, dual_clip * A_t)
                (Ye et al. 2020, arXiv:1912.09729, equation 5)

Algorithms differ in where A comes from, in what the ratio is, and in how tokens are averaged.
"""

from typing import Unpack

import mlx.core as mx
from jaxtyping import Bool, Float

from textpolicy.algorithms.averages import Average
from textpolicy.algorithms.objective import Loss, Terms, objective
from textpolicy.algorithms.ops import masked_sum, row_means
from textpolicy.algorithms.ratios import LogRatio
from textpolicy.types import Batch

Flags = Bool[mx.array, "batch _"]


class Clipping(Terms, total=False):
    """What any clipped policy loss takes."""

    delta: float | None
    """Two-sided clipping: the largest ratio in the unclipped branch."""
    dual_clip: float | None
    """The largest multiple of a negative advantage that a token can cost."""


def clipped_loss(
    logp: Float[mx.array, "batch time"],
    batch: Batch,
    *,
    clip_low: float,
    clip_high: float,
    average: Average,
    ratio: LogRatio,
    delta: float | None = None,
    dual_clip: float | None = None,
    **terms: Unpack[Terms],
) -> Loss:
    """The clipped surrogate, negated, averaged and composed as `terms` say."""
    log_ratio, by_sequence = ratio(logp, batch)
    now = mx.exp(log_ratio)
    free = now if delta is None else mx.minimum(now, delta)
    clipped = mx.clip(now, 1 - clip_low, 1 + clip_high)
    surrogate = mx.minimum(free * batch.advantages, clipped * batch.advantages)
    if dual_clip is not None:
        floor = mx.where(batch.advantages < 0, dual_clip * batch.advantages, -mx.inf)
        surrogate = mx.maximum(surrogate, floor)
    low = (now < 1 - clip_low) & (batch.advantages < 0)
    high = (now > 1 + clip_high) & (batch.advantages > 0)
    metrics = _clip_shares(low, high, batch, by_sequence=by_sequence)
    return objective(
        -surrogate, metrics, logp, batch, log_ratio=log_ratio, average=average, **terms
    )


def _clip_shares(
    low: Flags, high: Flags, batch: Batch, *, by_sequence: bool
) -> dict[str, mx.array]:
    """The shares of tokens, or of sequences, at which a clip stops the gradient."""
    return {
        "clip_ratio/low_mean": share(low, batch, by_sequence=by_sequence),
        "clip_ratio/low_min": _rows(low, batch, mx.inf).min(),
        "clip_ratio/high_mean": share(high, batch, by_sequence=by_sequence),
        "clip_ratio/high_max": _rows(high, batch, 0.0).max(),
        "clip_ratio/region_mean": share(low | high, batch, by_sequence=by_sequence),
    }


def share(flags: Flags, batch: Batch, *, by_sequence: bool) -> Float[mx.array, ""]:
    """The share of tokens that are flagged; or of sequences, each counted once."""
    flagged = flags.astype(mx.float32)
    if by_sequence:
        return row_means(flagged, batch.mask).sum() / batch.rows
    return masked_sum(flagged, batch.mask) / batch.token_count


def _rows(flags: Flags, batch: Batch, if_empty: float) -> Float[mx.array, " batch"]:
    shares = row_means(flags.astype(mx.float32), batch.mask)
    counted = batch.mask.any(axis=1)
    # Of a batch without a token that counts, all shares are 0.
    return mx.where(counted | ~counted.any(), shares, if_empty)
