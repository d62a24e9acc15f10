"""Lite PPO: Liu et al. 2025, Tricks or Traps? A Deep Dive into RL for LLM Reasoning,
arXiv:2508.08221, section 5: the group's mean and the batch's deviation.

    A_i = (R_i - mean(R of its group)) / (std(R of the batch) + eps)

A group's own deviation is estimated from few samples, and blows up where nearly all are equal. The
loss is the clipped one with every token of the batch weighing the same: DAPO's, with PPO's clips.
"""

from typing import Unpack

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms import dapo
from textpolicy.algorithms.objective import Loss
from textpolicy.algorithms.ops import Rewards, batch_std, center, check_group_size
from textpolicy.algorithms.surrogate import Clipping
from textpolicy.types import Batch


def compute_advantages(rewards: Rewards, *, eps: float = 1e-4) -> Rewards:
    """Rewards centred inside each group, scaled over all; NaN (no reward) is left out, gets 0."""
    check_group_size(rewards)
    return center(rewards) / (batch_std(rewards) + eps)


def policy_loss(
    logp: Float[mx.array, "batch time"],
    batch: Batch,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    **rest: Unpack[Clipping],
) -> Loss:
    """The clipped surrogate, negated: the mean over all tokens of the whole batch."""
    return dapo.policy_loss(logp, batch, clip_low=clip_low, clip_high=clip_high, **rest)
