"""Means and standard deviations of rewards, over a group or over the batch."""

import mlx.core as mx
from jaxtyping import Float

from textpolicy.errors import ConfigError

GroupRewards = Float[mx.array, "*groups group"]
"""Rewards or advantages; the last axis is the group. NaN marks a rollout without a reward."""


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
