"""Group Sequence Policy Optimization: Zheng et al. 2025, arXiv:2507.18071, equations 5 to 7.

    ratio_i = exp( 1/|o_i| sum_t (logp_t - logp_old_t) )
    J = 1/G sum_i min(ratio_i A_i, clip(ratio_i, 1 - clip_low, 1 + clip_high) A_i)

There is one ratio for a whole answer, so a clip drops or keeps all its tokens. The mean over the
length makes ratios comparable, and the clips narrower than those of tokens. Advantages are GRPO's.
"""

from typing import Unpack

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms import grpo
from textpolicy.algorithms.parts.averages import Average, sequence_mean
from textpolicy.algorithms.parts.declaration import Declaration
from textpolicy.algorithms.parts.loss import ClippedOptions, Loss, clip_metrics, compose_loss
from textpolicy.algorithms.parts.ratio_levels import SEQUENCE, RatioLevel
from textpolicy.types import Batch

DECLARATION = Declaration(paper="2507.18071", needs_advantages=True, trainer={"mini_batches": 4})
compute_advantages = grpo.compute_advantages


def policy_loss(
    logp: Float[mx.array, "batch time"],
    batch: Batch,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    ratio_level: RatioLevel = SEQUENCE,
    average: Average = sequence_mean,
    **options: Unpack[ClippedOptions],
) -> Loss:
    """Return the negated clipped surrogate of sequences: its mean over sequences."""
    ratio = mx.exp(ratio_level(logp - batch.logp_old, batch))
    clipped = mx.clip(ratio, 1 - clip_low, 1 + clip_high)
    surrogate = mx.minimum(ratio * batch.advantages, clipped * batch.advantages)
    metrics = clip_metrics(ratio, batch, clip_low, clip_high, ratio_level)
    return compose_loss(-surrogate, logp, batch, ratio, average, metrics, **options)
