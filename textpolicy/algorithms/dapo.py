"""The loss of DAPO: Yu et al. 2025, Decoupled Clip and Dynamic Sampling, arXiv:2503.14476, eq. 8.

    J = 1/sum_i |o_i| sum_i sum_t min(ratio_t A_i, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_i)

Every token of the batch weighs the same, so long answers weigh more than in GRPO, and the upper
clip is wider. Advantages are GRPO's (equation 9). Departures: dynamic sampling and the overlong
penalty, sections 3.2 and 3.4 of the paper, belong to sampling and rewards and are not here.
"""

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.grpo import compute_advantages
from textpolicy.algorithms.ops import masked_sum
from textpolicy.algorithms.surrogate import clipped_surrogate
from textpolicy.types import Batch

__all__ = ["compute_advantages", "policy_loss"]


def policy_loss(
    logp: Float[mx.array, "batch time"],
    batch: Batch,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> tuple[Float[mx.array, ""], dict[str, mx.array]]:
    """The clipped surrogate, negated: the mean over all tokens of the whole batch."""
    surrogate, metrics = clipped_surrogate(logp, batch, clip_low=clip_low, clip_high=clip_high)
    return -masked_sum(surrogate, batch.mask) / batch.token_count, metrics
