"""Group reward-Decoupled Normalization: GDPO, Liu et al. 2026, arXiv:2601.05242, equations 4 to 6.

For K reward functions with weights w_k:

    z_ik = (r_ik - mean(r_k of the group)) / (std(r_k of the group) + eps)
    A_i  = (sum_k w_k z_ik - mean over the batch) / (std over the batch + eps)

If rewards are added before they are standardised, different mixtures of them look alike. Here each
reward function keeps its own scale. The loss is GRPO's. Departures: std has n - 1; eps is 1e-4.
"""

from collections.abc import Mapping

import mlx.core as mx

from textpolicy.algorithms import grpo
from textpolicy.algorithms.parts.declaration import Declaration
from textpolicy.algorithms.parts.reductions import GroupRewards, batch_std, center, group_std
from textpolicy.errors import ConfigError

DECLARATION = Declaration(paper="2601.05242", needs_advantages=True)
policy_loss = grpo.policy_loss


def compute_advantages(
    rewards: GroupRewards,
    *,
    parts: Mapping[str, GroupRewards],
    reward_weights: Mapping[str, float] | None = None,
    eps: float = 1e-4,
) -> GroupRewards:
    """Return the weighted sum of each reward function's standardised values, standardised again.

    `rewards` decides who counts: a rollout without one (NaN) is left out and gets 0. Without named
    `parts`, `rewards` is the only part. A weight is 1 unless given.
    """
    parts = parts or {"reward": rewards}
    given = reward_weights or {}
    if unknown := sorted(set(given) - set(parts)):
        raise ConfigError(f"reward_weights names {unknown}; the reward functions are {[*parts]}")
    rewarded = ~mx.isnan(rewards)
    total = mx.zeros_like(rewards)
    for name, values in parts.items():
        counted = mx.where(rewarded, values, mx.nan)
        total = total + given.get(name, 1.0) * center(counted) / (group_std(counted) + eps)
    total = mx.where(rewarded, total, mx.nan).reshape(1, -1)
    return (center(total) / (batch_std(total) + eps)).reshape(rewards.shape)
