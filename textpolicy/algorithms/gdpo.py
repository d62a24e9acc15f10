"""Group reward-Decoupled Normalization: GDPO, Liu et al. 2026, arXiv:2601.05242, equations 4 to 6.

For K reward functions with weights w_k:

    z_ik = (r_ik - mean(r_k of the group)) / (std(r_k of the group) + eps)
    A_i  = (sum_k w_k z_ik - mean over the batch) / (std over the batch + eps)

Adding rewards before standardising makes different mixtures of them alike; here each keeps its own
scale. The loss is GRPO's. Departures: std has n - 1 and eps = 1e-4, as for GRPO here.
"""

from collections.abc import Mapping

import mlx.core as mx

from textpolicy.algorithms.grpo import policy_loss
from textpolicy.algorithms.ops import Rewards, batch_std, center, check_group_size, group_std
from textpolicy.errors import ConfigError

__all__ = ["compute_advantages", "policy_loss"]


def compute_advantages(
    rewards: Rewards,
    *,
    parts: Mapping[str, Rewards],
    weights: Mapping[str, float] | None = None,
    eps: float = 1e-4,
) -> Rewards:
    """Each reward function's standardised scores, weighted (1 each unless given) and added.

    `rewards` says who counts: a rollout without one (NaN) is left out and gets 0. With no parts by
    name it is itself the only one.
    """
    check_group_size(rewards)
    parts = parts or {"reward": rewards}
    if weights is not None and (strangers := set(weights) - set(parts)):
        raise ConfigError(f"weights for {sorted(strangers)}; the reward functions are {[*parts]}")
    scored = ~mx.isnan(rewards)
    total = mx.zeros_like(rewards)
    for name, values in parts.items():
        counted = mx.where(scored, values, mx.nan)
        weight = 1.0 if weights is None else weights.get(name, 1.0)
        total = total + weight * center(counted) / (group_std(counted) + eps)
    total = mx.where(scored, total, mx.nan).reshape(1, -1)
    return (center(total) / (batch_std(total) + eps)).reshape(rewards.shape)
