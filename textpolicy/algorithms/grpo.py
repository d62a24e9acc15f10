"""Group Relative Policy Optimization: DeepSeekMath, Shao et al. 2024, arXiv:2402.03300, 4.1.

For a group of G completions of one prompt with rewards R_1..R_G (equation 3, outcome supervision):

    A_i = (R_i - mean(R)) / (std(R) + eps)
    ratio_t = exp(logp_t - logp_old_t)
    J = 1/G sum_i 1/|o_i| sum_t [ min(ratio_t A_i, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_i)
                                  - beta KL_t ]

Departures: std divides by n - 1 and eps is 1e-4, as in TRL; beta is 0 unless you set it (0.04 in
the paper).
"""

from typing import Unpack

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.parts.averages import Average, sequence_mean
from textpolicy.algorithms.parts.declaration import Declaration
from textpolicy.algorithms.parts.loss import ClippedOptions, Loss, clip_metrics, compose_loss
from textpolicy.algorithms.parts.ratio_levels import TOKEN, RatioLevel
from textpolicy.algorithms.parts.reductions import GroupRewards, center, group_std
from textpolicy.types import Batch

DECLARATION = Declaration(paper="2402.03300", needs_advantages=True)


def compute_advantages(rewards: GroupRewards, *, eps: float = 1e-4) -> GroupRewards:
    """Return the rewards standardised inside each group."""
    return center(rewards) / (group_std(rewards) + eps)


def policy_loss(
    logp: Float[mx.array, "batch time"],
    batch: Batch,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio_level: RatioLevel = TOKEN,
    average: Average = sequence_mean,
    **options: Unpack[ClippedOptions],
) -> Loss:
    """Return the negated clipped surrogate: its mean over tokens, then over sequences."""
    ratio = mx.exp(ratio_level(logp - batch.logp_old, batch))
    clipped = mx.clip(ratio, 1 - clip_low, 1 + clip_high)
    surrogate = mx.minimum(ratio * batch.advantages, clipped * batch.advantages)
    metrics = clip_metrics(ratio, batch, clip_low, clip_high, ratio_level)
    return compose_loss(-surrogate, logp, batch, ratio, average, metrics, **options)
