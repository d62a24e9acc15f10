"""Maximum Likelihood Reinforcement Learning: Tajwar et al. 2026, arXiv:2602.02710.

    A_i = (R_i - mean(R)) / mean(R),  0 where mean(R) <= 0

For rewards of 0 and 1 the expected gradient becomes that of log(probability of success), as far as
a group's size can estimate it, in place of that of the probability: tasks that are rarely solved
count for more. Rewards are taken to be 0 or more. The loss is REINFORCE's.
"""

import mlx.core as mx

from textpolicy.algorithms.ops import Rewards, center, check_group_size
from textpolicy.algorithms.reinforce import policy_loss

__all__ = ["compute_advantages", "policy_loss"]


def compute_advantages(rewards: Rewards) -> Rewards:
    """Rewards less their group's mean, over that mean; NaN (no reward) is left out and gets 0."""
    check_group_size(rewards)
    scored = ~mx.isnan(rewards)
    count = mx.maximum(scored.sum(axis=-1, keepdims=True), 1)
    mean = mx.where(scored, rewards, 0).sum(axis=-1, keepdims=True) / count
    return mx.where(mean > 0, center(rewards) / mx.where(mean > 0, mean, 1), 0)
