"""Sums, means, shares and quantiles of values of tokens; deviations of rewards in groups."""

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Float, Integer, Num

from textpolicy.errors import ConfigError
from textpolicy.types import Batch

PerToken = Float[mx.array, "batch _"]
"""One value for each token, or one for each row that holds for all tokens of the row."""
GroupRewards = Float[mx.array, "*groups group"]
"""Rewards or advantages; the last axis is the group. NaN marks a rollout without a reward."""


def masked_sum(x: PerToken, mask: Bool[mx.array, "batch time"]) -> Float[mx.array, ""]:
    """Return the sum over counted tokens. Values outside the mask may be NaN."""
    return mx.where(mask, x, 0).sum()


def add_segments(x: Num[mx.array, " batch"], batch: Batch) -> Num[mx.array, " batch"]:
    """Return for each row the sum of the values of all segments of its sequence.

    A sequence is all that was sampled in one rollout. Most rollouts are one row.
    """
    if batch.rollout is None:
        return x
    return mx.zeros(len(x), dtype=x.dtype).at[batch.rollout].add(x)[batch.rollout]


def mean_of_sequences(x: PerToken, batch: Batch) -> Float[mx.array, ""]:
    """Return the mean over the batch's sequences of each sequence's mean over its tokens."""
    sums = mx.where(batch.mask, x, 0).sum(axis=1)
    return (sums / _counted_tokens(batch)).sum() / batch.rows


def sequence_means(x: PerToken, batch: Batch) -> Float[mx.array, " batch"]:
    """Return the mean over the counted tokens of each row's sequence; 0 if it has none."""
    sums = mx.where(batch.mask, x, 0).sum(axis=1)
    return add_segments(sums, batch) / _counted_tokens(batch)


def first_rows(batch: Batch) -> Integer[mx.array, " sequences"]:
    """Return the number of the first row of each sequence."""
    if batch.rollout is None:
        return mx.arange(len(batch.owner))
    return mx.array(np.unique(np.array(batch.rollout), return_index=True)[1])


def _counted_tokens(batch: Batch) -> Integer[mx.array, " batch"]:
    return mx.maximum(add_segments(batch.mask.sum(axis=1), batch), 1)


def flagged_share(
    flags: Bool[mx.array, "batch _"], batch: Batch, by_sequence: bool
) -> Float[mx.array, ""]:
    """Return the share of the batch's tokens that are flagged, or of its sequences."""
    flagged = flags.astype(mx.float32)
    if by_sequence:
        return mean_of_sequences(flagged, batch)
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
