"""GRPO Done Right: Liu et al. 2025, Understanding R1-Zero-Like Training, arXiv:2503.20783.

    A_i = R_i - mean(R)
    J = 1/(G max_tokens) sum_i sum_t min(ratio_t A_i, clip(ratio_t, 1-clip_low, 1+clip_high) A_i)

GRPO without its two biases: no division by the group's deviation, which favours tasks that are
nearly always or never solved, and none by the answer's length, which favours long wrong answers.
The constant `max_tokens` in its place is that of the authors' code.
"""

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.ops import center, check_group_size, masked_sum
from textpolicy.algorithms.surrogate import clipped_surrogate
from textpolicy.types import Batch


def compute_advantages(
    rewards: Float[mx.array, "*groups group"],
) -> Float[mx.array, "*groups group"]:
    """Rewards less their group's mean; NaN (no reward) is left out and gets 0."""
    check_group_size(rewards)
    return center(rewards)


def policy_loss(
    logp: Float[mx.array, "batch time"],
    batch: Batch,
    *,
    max_tokens: int,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Float[mx.array, ""], dict[str, mx.array]]:
    """The clipped surrogate, negated: summed over tokens, divided by a constant length.

    `max_tokens` is the longest that a completion may be, as the policy samples them.
    """
    surrogate, metrics = clipped_surrogate(logp, batch, clip_low=clip_low, clip_high=clip_high)
    return -masked_sum(surrogate, batch.mask) / (batch.rows * max_tokens), metrics
