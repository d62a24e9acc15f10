"""REINFORCE Leave-One-Out: Ahmadian et al. 2024, Back to Basics, arXiv:2402.14740.

    A_i = R_i - 1/(n - 1) sum_{j != i} R_j = n/(n - 1) (R_i - mean(R))
    ratio_i = exp(sum_t (logp_t - logp_old_t))
    J = 1/G sum_i ratio_i A_i

A whole answer is one action: its log-probability is the sum over its tokens. The paper subtracts
the KL divergence from the reward; the trainer's `reward_kl` does so here. Departure: the ratio is
clipped as in PPO. Clipping changes nothing in the first update on a batch, and the paper makes
only one update on each batch.
"""

from typing import Unpack

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.parts.averages import Average, sequence_mean
from textpolicy.algorithms.parts.declaration import Declaration
from textpolicy.algorithms.parts.loss import ClippedOptions, Loss, clip_metrics, compose_loss
from textpolicy.algorithms.parts.ratio_levels import WHOLE_SEQUENCE, RatioLevel
from textpolicy.algorithms.parts.reductions import GroupRewards, center
from textpolicy.types import Batch

DECLARATION = Declaration(
    paper="2402.14740", needs_advantages=True, trainer={"reference": "base", "reward_kl": 0.05}
)


def compute_advantages(rewards: GroupRewards) -> GroupRewards:
    """Return each reward less the mean of the other rewards of its group."""
    count = (~mx.isnan(rewards)).sum(axis=-1, keepdims=True)
    return center(rewards) * count / mx.maximum(count - 1, 1)


def policy_loss(
    logp: Float[mx.array, "batch time"],
    batch: Batch,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio_level: RatioLevel = WHOLE_SEQUENCE,
    average: Average = sequence_mean,
    **options: Unpack[ClippedOptions],
) -> Loss:
    """Return the negated clipped surrogate of whole answers: its mean over answers."""
    ratio = mx.exp(ratio_level(logp - batch.logp_old, batch))
    clipped = mx.clip(ratio, 1 - clip_low, 1 + clip_high)
    surrogate = mx.minimum(ratio * batch.advantages, clipped * batch.advantages)
    metrics = clip_metrics(ratio, batch, clip_low, clip_high, ratio_level)
    return compose_loss(-surrogate, logp, batch, ratio, average, metrics, **options)
