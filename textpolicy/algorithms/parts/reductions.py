"""Sums, means, shares and quantiles of values of tokens; deviations of rewards in groups."""

import mlx.core as mx
from jaxtyping import Bool, Float

from textpolicy.errors import ConfigError
from textpolicy.types import Batch

PerToken = Float[mx.array, "batch _"]
"""One value for each token, or one for each row that holds for all tokens of the row."""
GroupRewards = Float[mx.array, "*groups group"]
"""Rewards or advantages; the last axis is the group. NaN marks a rollout without a reward."""


def masked_sum(x: PerToken, mask: Bool[mx.array, "batch time"]) -> Float[mx.array, ""]:
    """Return the sum over counted tokens. Values outside the mask may be NaN."""
    return mx.where(mask, x, 0).sum()


def row_means(x: PerToken, mask: Bool[mx.array, "batch time"]) -> Float[mx.array, " batch"]:
    """Return each row's mean over its counted tokens; 0 for a row without any."""
    return mx.where(mask, x, 0).sum(axis=1) / mx.maximum(mask.sum(axis=1), 1)


def flagged_share(
    flags: Bool[mx.array, "batch _"], batch: Batch, by_sequence: bool
) -> Float[mx.array, ""]:
    """Return the share of the batch's tokens that are flagged, or of its sequences."""
    flagged = flags.astype(mx.float32)
    if by_sequence:
        return row_means(flagged, batch.mask).sum() / batch.rows
    return masked_sum(flagged, batch.mask) / batch.token_count


def quantile(values: Float[mx.array, " values"], at: float) -> Float[mx.array, ""]:
    """Return the value below which a share `at` of the values lies, interpolated linearly."""
    ordered = mx.sort(values)
    place = at * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def center(rewards: GroupRewards) -> GroupRewards:
    """Return each reward less the mean of its group's rewards; NaN (no reward) becomes 0.

    A group of equal rewards gives exact zeros. Rounding noise in their place would reach Adam,
    which scales any gradient up to full-size steps. A group of one is refused.
    """
    if rewards.shape[-1] < 2:
        raise ConfigError(
            f"group size is {rewards.shape[-1]}; expected at least 2, because a completion is "
            "compared with others of the same prompt"
        )
    rewarded = ~mx.isnan(rewards)
    lowest = mx.where(rewarded, rewards, mx.inf).min(axis=-1, keepdims=True)
    above = mx.where(rewarded, rewards - lowest, 0)
    count = mx.maximum(rewarded.sum(axis=-1, keepdims=True), 1)
    return mx.where(rewarded, above - above.sum(axis=-1, keepdims=True) / count, 0)


def group_std(rewards: GroupRewards) -> Float[mx.array, "*groups 1"]:
    """Return each group's standard deviation, with n - 1; 0 for fewer than two rewards."""
    freedom = mx.maximum((~mx.isnan(rewards)).sum(axis=-1, keepdims=True) - 1, 1)
    return mx.sqrt(mx.square(center(rewards)).sum(axis=-1, keepdims=True) / freedom)


def batch_std(rewards: GroupRewards) -> Float[mx.array, ""]:
    """Return the standard deviation, with n - 1, of all rewards of all groups."""
    return group_std(rewards.reshape(1, -1))[0, 0]
