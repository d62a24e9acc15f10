"""REINFORCE++: Hu et al. 2025, arXiv:2501.03262, and its form with a group baseline.

    A_t = (R_i - mean(R over all tokens of the batch)) / std(R over all tokens of the batch)

The baseline is that of the whole batch, so it is also one for tasks sampled once; each answer
counts in it as often as it has tokens. The second form takes the group's mean off first. Rewards
are for whole answers, without discount. Departure: the divergence from the reference is taken off
the whole answer's reward (`reward_kl` of the trainer), not token by token. The loss is PPO's, over
all tokens of the batch.
"""

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.lite_ppo import policy_loss
from textpolicy.algorithms.ops import Rewards, center, check_group_size

__all__ = ["compute_advantages", "compute_baseline_advantages", "policy_loss"]


def compute_advantages(
    rewards: Rewards, *, lengths: Float[mx.array, "*groups group"], eps: float = 1e-8
) -> Rewards:
    """Rewards standardised over all tokens of the batch; NaN (no reward) is left out, gets 0."""
    return _whitened(rewards, lengths, eps)


def compute_baseline_advantages(
    rewards: Rewards, *, lengths: Float[mx.array, "*groups group"], eps: float = 1e-8
) -> Rewards:
    """The same for rewards less their group's mean."""
    check_group_size(rewards)
    centered = mx.where(mx.isnan(rewards), mx.nan, center(rewards))
    return _whitened(centered, lengths, eps)


def _whitened(values: Rewards, lengths: Rewards, eps: float) -> Rewards:
    scored = ~mx.isnan(values)
    weight = mx.where(scored, lengths, 0)
    count = mx.maximum(weight.sum(), 1)
    # Counted from the lowest: equal values give exact zeros, and not noise that eps would enlarge.
    above = mx.where(scored, values - mx.where(scored, values, mx.inf).min(), 0)
    distance = mx.where(scored, above - (weight * above).sum() / count, 0)
    variance = (weight * mx.square(distance)).sum() / mx.maximum(count - 1, 1)
    return distance * mx.rsqrt(variance + eps)
