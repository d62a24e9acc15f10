"""Maximum Likelihood Reinforcement Learning: Tajwar et al. 2026, arXiv:2602.02710.

    A_i = (R_i - mean(R)) / mean(R),  0 where mean(R) <= 0

For rewards of 0 and 1, the expected gradient becomes that of log(probability of success), as far as
the group size can estimate it, in place of that of the probability. The weight of a task
grows as its success rate falls. Rewards must be 0 or more. The loss is REINFORCE's.
"""

import mlx.core as mx

from textpolicy.algorithms import reinforce
from textpolicy.algorithms.parts.declaration import Declaration
from textpolicy.algorithms.parts.reductions import GroupRewards, center

DECLARATION = Declaration(paper="2602.02710", needs_advantages=True)
policy_loss = reinforce.policy_loss


def compute_advantages(rewards: GroupRewards) -> GroupRewards:
    """Return each reward less its group's mean, divided by that mean."""
    rewarded = ~mx.isnan(rewards)
    count = mx.maximum(rewarded.sum(axis=-1, keepdims=True), 1)
    mean = mx.where(rewarded, rewards, 0).sum(axis=-1, keepdims=True) / count
    return mx.where(mean > 0, center(rewards) / mx.where(mean > 0, mean, 1), 0)
