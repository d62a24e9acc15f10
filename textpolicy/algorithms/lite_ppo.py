"""Lite PPO: Liu et al. 2025, Tricks or Traps? A Deep Dive into RL for LLM Reasoning,
arXiv:2508.08221, section 5: the group's mean and the batch's standard deviation.

    A_i = (R_i - mean(R of its group)) / (std(R of the batch) + eps)
    ratio_t = exp(logp_t - logp_old_t)
    J = 1/sum_i |o_i| sum_i sum_t min(ratio_t A_i, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_i)

A group's own standard deviation is uncertain, and nearly 0 where nearly all rewards are equal.
"""

from typing import Unpack

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.parts.averages import Average, token_mean
from textpolicy.algorithms.parts.declaration import Declaration
from textpolicy.algorithms.parts.loss import ClippedOptions, Loss, clip_metrics, compose_loss
from textpolicy.algorithms.parts.ratio_levels import TOKEN, RatioLevel
from textpolicy.algorithms.parts.reductions import GroupRewards, batch_std, center
from textpolicy.types import Batch

DECLARATION = Declaration(paper="2508.08221", needs_advantages=True)


def compute_advantages(rewards: GroupRewards, *, eps: float = 1e-4) -> GroupRewards:
    """Return each reward less its group's mean, divided by the batch's standard deviation."""
    return center(rewards) / (batch_std(rewards) + eps)


def policy_loss(
    logp: Float[mx.array, "batch time"],
    batch: Batch,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio_level: RatioLevel = TOKEN,
    average: Average = token_mean,
    **options: Unpack[ClippedOptions],
) -> Loss:
    """Return the negated clipped surrogate: its mean over all tokens of the batch."""
    ratio = mx.exp(ratio_level(logp - batch.logp_old, batch))
    clipped = mx.clip(ratio, 1 - clip_low, 1 + clip_high)
    surrogate = mx.minimum(ratio * batch.advantages, clipped * batch.advantages)
    metrics = clip_metrics(ratio, batch, clip_low, clip_high, ratio_level)
    return compose_loss(-surrogate, logp, batch, ratio, average, metrics, **options)
