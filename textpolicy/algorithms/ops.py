"""Reductions over groups and over masked tokens, shared by the algorithms."""

import mlx.core as mx
from jaxtyping import Bool, Float

from textpolicy.errors import ConfigError

Rewards = Float[mx.array, "*groups group"]
"""Rewards, or advantages, with the members of a group along the last axis; NaN is "not scored"."""


PerToken = Float[mx.array, "batch _"]
"""A value for each token, or one for each row that holds for all its tokens."""


def check_group_size(rewards: Rewards) -> None:
    """Refuse groups of one, where every baseline made of the others is empty."""
    if rewards.shape[-1] < 2:
        raise ConfigError(
            f"group size is {rewards.shape[-1]}; expected at least 2: a completion is only better "
            "or worse than others of the same prompt"
        )


def center(rewards: Rewards) -> Rewards:
    """Rewards less their group's mean over scored members; NaN (no reward) becomes 0.

    A group of equal rewards gives exact zeros: rounding noise in their place would reach Adam,
    which scales any gradient to full-size steps.
    """
    scored = ~mx.isnan(rewards)
    lowest = mx.where(scored, rewards, mx.inf).min(axis=-1, keepdims=True)
    above = mx.where(scored, rewards - lowest, 0)
    count = mx.maximum(scored.sum(axis=-1, keepdims=True), 1)
    return mx.where(scored, above - above.sum(axis=-1, keepdims=True) / count, 0)


def group_std(rewards: Rewards) -> Float[mx.array, "*groups 1"]:
    """Each group's sample standard deviation (n - 1) over its scored members; 0 below two."""
    scored = ~mx.isnan(rewards)
    freedom = mx.maximum(scored.sum(axis=-1, keepdims=True) - 1, 1)
    return mx.sqrt(mx.square(center(rewards)).sum(axis=-1, keepdims=True) / freedom)


def batch_std(rewards: Rewards) -> Float[mx.array, ""]:
    """The sample standard deviation (n - 1) over every scored member of every group."""
    return group_std(rewards.reshape(1, -1))[0, 0]


def masked_sum(x: PerToken, mask: Bool[mx.array, "batch time"]) -> Float[mx.array, ""]:
    """The sum over counted tokens; what lies outside the mask may be anything, NaN included."""
    return mx.where(mask, x, 0).sum()


def row_means(x: PerToken, mask: Bool[mx.array, "batch time"]) -> Float[mx.array, " batch"]:
    """Each row's mean over its counted tokens; 0 where none counts."""
    return mx.where(mask, x, 0).sum(axis=1) / mx.maximum(mask.sum(axis=1), 1)
