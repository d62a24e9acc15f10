"""Clipped Importance Sampling Policy Optimization: MiniMax-M1, arXiv:2506.13585, equation 4.

    ratio_t = exp(logp_t - logp_old_t)
    J = 1/sum_i |o_i| sum_i sum_t stop_gradient(min(ratio_t, cap)) A_i logp_t

The ratio is a capped weight and never stops a token's gradient. Rare tokens that begin a reflection
keep their gradient, where PPO's clip would drop them after the first update. Advantages are GRPO's.
Departures: `cap` is the largest weight itself, 1 + epsilon_high in the paper, with the value of
ScaleRL (arXiv:2510.13786); there is no lower bound, as the paper's has no effect.
"""

from typing import Unpack

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms import grpo
from textpolicy.algorithms.parts.averages import Average, token_mean
from textpolicy.algorithms.parts.declaration import Declaration
from textpolicy.algorithms.parts.loss import Loss, LossOptions, compose_loss
from textpolicy.algorithms.parts.ratio_levels import TOKEN, RatioLevel
from textpolicy.algorithms.parts.reductions import flagged_share
from textpolicy.types import Batch

DECLARATION = Declaration(paper="2506.13585", needs_advantages=True)
compute_advantages = grpo.compute_advantages


def policy_loss(
    logp: Float[mx.array, "batch time"],
    batch: Batch,
    *,
    cap: float = 5.0,
    ratio_level: RatioLevel = TOKEN,
    average: Average = token_mean,
    **options: Unpack[LossOptions],
) -> Loss:
    """Return the negated log-probabilities times advantage and capped ratio: their token mean."""
    ratio = mx.exp(ratio_level(logp - batch.logp_old, batch))
    weight = mx.stop_gradient(mx.minimum(ratio, cap))
    objective = weight * batch.advantages * mx.where(batch.mask, logp, 0)
    capped = (ratio > cap) & (batch.advantages > 0)
    metrics = {"cispo_clip_ratio": flagged_share(capped, batch, ratio_level.by_sequence)}
    return compose_loss(-objective, logp, batch, ratio, average, metrics, **options)
