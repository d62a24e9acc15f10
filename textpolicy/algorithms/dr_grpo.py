"""GRPO Done Right: Liu et al. 2025, Understanding R1-Zero-Like Training, arXiv:2503.20783.

    A_i = R_i - mean(R)
    ratio_t = exp(logp_t - logp_old_t)
    J = 1/(G max_tokens) sum_i sum_t min(ratio_t A_i, clip(ratio_t, 1-clip_low, 1+clip_high) A_i)

GRPO without two biases. It does not divide by the group's standard deviation, which favours tasks
that are nearly always or never solved. It does not divide by the answer's length, which favours
long wrong answers; it divides by `max_tokens`, the length limit of sampling, as the authors' code.
"""

from typing import Unpack

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.parts.averages import Average, length_limit
from textpolicy.algorithms.parts.declaration import Declaration
from textpolicy.algorithms.parts.loss import ClippedOptions, Loss, clip_metrics, compose_loss
from textpolicy.algorithms.parts.ratio_levels import TOKEN, RatioLevel
from textpolicy.algorithms.parts.reductions import GroupRewards, center
from textpolicy.types import Batch

DECLARATION = Declaration(paper="2503.20783", needs_advantages=True)


def compute_advantages(rewards: GroupRewards) -> GroupRewards:
    """Return each reward less its group's mean."""
    return center(rewards)


def policy_loss(
    logp: Float[mx.array, "batch time"],
    batch: Batch,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio_level: RatioLevel = TOKEN,
    average: Average = length_limit,
    **options: Unpack[ClippedOptions],
) -> Loss:
    """Return the negated clipped surrogate: its sum over tokens, divided by the length limit."""
    ratio = mx.exp(ratio_level(logp - batch.logp_old, batch))
    clipped = mx.clip(ratio, 1 - clip_low, 1 + clip_high)
    surrogate = mx.minimum(ratio * batch.advantages, clipped * batch.advantages)
    metrics = clip_metrics(ratio, batch, clip_low, clip_high, ratio_level)
    return compose_loss(-surrogate, logp, batch, ratio, average, metrics, **options)
