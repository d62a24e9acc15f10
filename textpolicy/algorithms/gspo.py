"""Group Sequence Policy Optimization: Zheng et al. 2025, arXiv:2507.18071, equations 5 to 7.

    s_i = exp( 1/|o_i| sum_t (logp_t - logp_old_t) )
    J = 1/G sum_i min(s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i)

One ratio for a whole answer, so that a clip drops or keeps it whole; the mean over its length makes
ratios of answers comparable, and the clips far narrower than those of tokens. Advantages are
GRPO's.
"""

from typing import Unpack

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.averages import Average, sequence_mean
from textpolicy.algorithms.grpo import compute_advantages
from textpolicy.algorithms.objective import Loss
from textpolicy.algorithms.ratios import LogRatio, sequence_log_ratio
from textpolicy.algorithms.surrogate import Clipping, clipped_loss
from textpolicy.types import Batch

__all__ = ["compute_advantages", "policy_loss"]


def policy_loss(
    logp: Float[mx.array, "batch time"],
    batch: Batch,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    ratio: LogRatio = sequence_log_ratio,
    average: Average = sequence_mean,
    **rest: Unpack[Clipping],
) -> Loss:
    """The clipped surrogate of sequences, negated: its mean over sequences."""
    return clipped_loss(
        logp, batch, clip_low=clip_low, clip_high=clip_high, ratio=ratio, average=average, **rest
    )
