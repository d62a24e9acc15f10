"""Group Relative Policy Optimization: DeepSeekMath, Shao et al. 2024, arXiv:2402.03300, 4.1.

For a group of G completions of one prompt with rewards R_1..R_G (equation 3, outcome supervision):

    A_i = (R_i - mean(R)) / (std(R) + eps)
    ratio_t = exp(logp_t - logp_old_t)
    J = 1/G sum_i 1/|o_i| sum_t [ min(ratio_t A_i, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_i)
                                  - beta KL_t ]

Departures: the group is the last axis and never mixes with another; std has n - 1 and eps = 1e-4,
as the libraries that people compare with; beta is 0 unless asked for (the paper's is 0.04).
"""

from typing import Unpack

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.averages import Average, sequence_mean
from textpolicy.algorithms.objective import Loss
from textpolicy.algorithms.ops import Rewards, center, check_group_size, group_std
from textpolicy.algorithms.ratios import LogRatio, token_log_ratio
from textpolicy.algorithms.surrogate import Clipping, clipped_loss
from textpolicy.types import Batch


def compute_advantages(rewards: Rewards, *, eps: float = 1e-4) -> Rewards:
    """Rewards standardised inside each group; NaN (no reward) is left out and gets 0."""
    check_group_size(rewards)
    return center(rewards) / (group_std(rewards) + eps)


def policy_loss(
    logp: Float[mx.array, "batch time"],
    batch: Batch,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio: LogRatio = token_log_ratio,
    average: Average = sequence_mean,
    **rest: Unpack[Clipping],
) -> Loss:
    """The clipped surrogate, negated: each sequence's token mean, averaged over sequences."""
    return clipped_loss(
        logp, batch, clip_low=clip_low, clip_high=clip_high, ratio=ratio, average=average, **rest
    )
