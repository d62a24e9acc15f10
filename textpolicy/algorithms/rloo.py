"""REINFORCE Leave-One-Out: Ahmadian et al. 2024, Back to Basics, arXiv:2402.14740.

    A_i = R_i - 1/(n - 1) sum_{j != i} R_j = n/(n - 1) (R_i - mean(R))
    J = 1/G sum_i exp(sum_t (logp_t - logp_old_t)) A_i

A whole answer is one action, so its log-probability is the sum of its tokens', and every token of a
long answer counts in full. The paper takes the divergence from the reference off the reward: that
is `reward_kl` of the trainer. Departure: the ratio is clipped as in PPO, which changes nothing in
the first update of a batch, the only one of the paper.
"""

from typing import Unpack

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.averages import Average, sequence_mean
from textpolicy.algorithms.objective import Loss
from textpolicy.algorithms.ops import Rewards, center, check_group_size
from textpolicy.algorithms.ratios import LogRatio, whole_sequence_log_ratio
from textpolicy.algorithms.surrogate import Clipping, clipped_loss
from textpolicy.types import Batch


def compute_advantages(rewards: Rewards) -> Rewards:
    """Each reward less the mean of the others of its group; NaN (no reward) counts for none."""
    check_group_size(rewards)
    count = (~mx.isnan(rewards)).sum(axis=-1, keepdims=True)
    return center(rewards) * count / mx.maximum(count - 1, 1)


def policy_loss(
    logp: Float[mx.array, "batch time"],
    batch: Batch,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio: LogRatio = whole_sequence_log_ratio,
    average: Average = sequence_mean,
    **rest: Unpack[Clipping],
) -> Loss:
    """The clipped surrogate of whole answers, negated: its mean over answers."""
    return clipped_loss(
        logp, batch, clip_low=clip_low, clip_high=clip_high, ratio=ratio, average=average, **rest
    )
