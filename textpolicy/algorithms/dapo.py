"""DAPO: Yu et al. 2025, Decoupled Clip and Dynamic Sampling, arXiv:2503.14476, equation 8.

    ratio_t = exp(logp_t - logp_old_t)
    J = 1/sum_i |o_i| sum_i sum_t min(ratio_t A_i, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_i)

Every token of the batch has the same weight, so long answers count for more than in GRPO, and the
upper clip is wider. Advantages are GRPO's (equation 9). Dynamic sampling (section 3.2 of the
paper) happens while rollouts are collected; the option `overlong_cache` turns on the penalty for
overlong answers (section 3.4).
"""

from typing import Unpack

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms import grpo
from textpolicy.algorithms.parts.averages import Average, token_mean
from textpolicy.algorithms.parts.declaration import Declaration
from textpolicy.algorithms.parts.loss import ClippedOptions, Loss, clip_metrics, compose_loss
from textpolicy.algorithms.parts.ratio_levels import TOKEN, RatioLevel
from textpolicy.types import Batch

DECLARATION = Declaration(paper="2503.14476", needs_advantages=True, dynamic_sampling=True)
compute_advantages = grpo.compute_advantages


def policy_loss(
    logp: Float[mx.array, "batch time"],
    batch: Batch,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
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
