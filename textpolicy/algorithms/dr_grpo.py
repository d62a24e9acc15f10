"""GRPO Done Right: Liu et al. 2025, Understanding R1-Zero-Like Training, arXiv:2503.20783.

    A_i = R_i - mean(R)
    J = 1/(G max_tokens) sum_i sum_t min(ratio_t A_i, clip(ratio_t, 1-clip_low, 1+clip_high) A_i)

GRPO without its two biases: no division by the group's deviation, which favours tasks that are
nearly always or never solved, and none by the answer's length, which favours long wrong answers.
The constant `max_tokens` in its place is that of the authors' code: the longest that an answer
could be when it was sampled.
"""

from typing import Unpack

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.averages import Average, longest_length
from textpolicy.algorithms.objective import Loss
from textpolicy.algorithms.ops import Rewards, center, check_group_size
from textpolicy.algorithms.ratios import LogRatio, token_log_ratio
from textpolicy.algorithms.surrogate import Clipping, clipped_loss
from textpolicy.types import Batch


def compute_advantages(rewards: Rewards) -> Rewards:
    """Rewards less their group's mean; NaN (no reward) is left out and gets 0."""
    check_group_size(rewards)
    return center(rewards)


def policy_loss(
    logp: Float[mx.array, "batch time"],
    batch: Batch,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio: LogRatio = token_log_ratio,
    average: Average = longest_length,
    **rest: Unpack[Clipping],
) -> Loss:
    """The clipped surrogate, negated: summed over tokens, divided by a constant length.

    For another constant pass `average=constant_length(n)`.
    """
    return clipped_loss(
        logp, batch, clip_low=clip_low, clip_high=clip_high, ratio=ratio, average=average, **rest
    )
