"""Length-Unbiased Sequence Policy Optimization: arXiv:2602.05261.

    J = 1/G sum_i |o_i| min(s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i)

GSPO's objective with each sequence weighed by its length: there a token of a long answer moves the
policy less than one of a short answer, and answers shrink. Advantages are GRPO's.
"""

from typing import Unpack

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.averages import Average, sequence_sum
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
    clip_low: float = 2e-3,
    clip_high: float = 2.5e-3,
    ratio: LogRatio = sequence_log_ratio,
    average: Average = sequence_sum,
    **rest: Unpack[Clipping],
) -> Loss:
    """The clipped surrogate of sequences times their lengths, negated: its mean over sequences."""
    return clipped_loss(
        logp, batch, clip_low=clip_low, clip_high=clip_high, ratio=ratio, average=average, **rest
    )
