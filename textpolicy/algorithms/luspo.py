"""Length-Unbiased Sequence Policy Optimization: arXiv:2602.05261.

    ratio_i = exp( 1/|o_i| sum_t (logp_t - logp_old_t) )
    J = 1/G sum_i |o_i| min(ratio_i A_i, clip(ratio_i, 1 - clip_low, 1 + clip_high) A_i)

GSPO's objective with each sequence weighted by its length. In GSPO, a token of a long answer moves
the policy less than a token of a short answer, and answers shrink. Advantages are GRPO's.
"""

from typing import Unpack

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms import grpo
from textpolicy.algorithms.parts.averages import Average, sequence_sum
from textpolicy.algorithms.parts.declaration import Declaration
from textpolicy.algorithms.parts.loss import ClippedOptions, Loss, clip_metrics, compose_loss
from textpolicy.algorithms.parts.ratio_levels import SEQUENCE, RatioLevel
from textpolicy.types import Batch

DECLARATION = Declaration(paper="2602.05261", needs_advantages=True)
compute_advantages = grpo.compute_advantages


def policy_loss(
    logp: Float[mx.array, "batch time"],
    batch: Batch,
    *,
    clip_low: float = 2e-3,
    clip_high: float = 2.5e-3,
    ratio_level: RatioLevel = SEQUENCE,
    average: Average = sequence_sum,
    **options: Unpack[ClippedOptions],
) -> Loss:
    """Return the negated clipped surrogate of sequences times their lengths: its mean."""
    ratio = mx.exp(ratio_level(logp - batch.logp_old, batch))
    clipped = mx.clip(ratio, 1 - clip_low, 1 + clip_high)
    surrogate = mx.minimum(ratio * batch.advantages, clipped * batch.advantages)
    metrics = clip_metrics(ratio, batch, clip_low, clip_high, ratio_level)
    return compose_loss(-surrogate, logp, batch, ratio, average, metrics, **options)
