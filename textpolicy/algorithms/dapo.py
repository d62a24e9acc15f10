"""DAPO: Yu et al. 2025, Decoupled Clip and Dynamic Sampling, arXiv:2503.14476, equation 8.

    J = 1/sum_i |o_i| sum_i sum_t min(ratio_t A_i, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_i)

Every token of the batch weighs the same, so long answers weigh more than in GRPO, and the upper
clip is wider. Advantages are GRPO's (equation 9). The paper's dynamic sampling (3.2) is done while
rollouts are collected, and its penalty for overlong answers (3.4) is `overlong.with_penalty`.
"""

from typing import Unpack

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.averages import Average, token_mean
from textpolicy.algorithms.grpo import compute_advantages
from textpolicy.algorithms.objective import Loss
from textpolicy.algorithms.ratios import LogRatio, token_log_ratio
from textpolicy.algorithms.surrogate import Clipping, clipped_loss
from textpolicy.types import Batch

__all__ = ["compute_advantages", "policy_loss"]


def policy_loss(
    logp: Float[mx.array, "batch time"],
    batch: Batch,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    ratio: LogRatio = token_log_ratio,
    average: Average = token_mean,
    **rest: Unpack[Clipping],
) -> Loss:
    """The clipped surrogate, negated: the mean over all tokens of the whole batch."""
    return clipped_loss(
        logp, batch, clip_low=clip_low, clip_high=clip_high, ratio=ratio, average=average, **rest
    )
