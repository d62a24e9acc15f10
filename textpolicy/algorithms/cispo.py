"""Clipped Importance Sampling Policy Optimization: MiniMax-M1, arXiv:2506.13585, equation 4.

    J = 1/sum_i |o_i| sum_i sum_t stop_gradient(min(ratio_t, cap)) A_i logp_t

The ratio is capped as a weight and never stops a token's gradient: rare tokens that begin a
reflection keep theirs, where PPO's clip would drop them after the first update. Advantages are
GRPO's. Departures: `cap` is the largest weight itself, 1 + epsilon_high in the paper's words, with
the value of ScaleRL (arXiv:2510.13786); there is no lower bound, as the paper has none in effect.
"""

from typing import Unpack

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.averages import Average, token_mean
from textpolicy.algorithms.grpo import compute_advantages
from textpolicy.algorithms.objective import Loss, Terms, objective
from textpolicy.algorithms.ratios import LogRatio, token_log_ratio
from textpolicy.algorithms.surrogate import share
from textpolicy.types import Batch

__all__ = ["compute_advantages", "policy_loss"]


def policy_loss(
    logp: Float[mx.array, "batch time"],
    batch: Batch,
    *,
    cap: float = 5.0,
    ratio: LogRatio = token_log_ratio,
    average: Average = token_mean,
    **terms: Unpack[Terms],
) -> Loss:
    """Log-probabilities weighed by advantage and capped ratio, negated: the mean over tokens."""
    log_ratio, by_sequence = ratio(logp, batch)
    now = mx.stop_gradient(mx.exp(log_ratio))
    loss = -mx.minimum(now, cap) * batch.advantages * mx.where(batch.mask, logp, 0)
    capped = (now > cap) & (batch.advantages > 0)
    metrics = {"cispo_clip_ratio": share(capped, batch, by_sequence=by_sequence)}
    return objective(loss, metrics, logp, batch, log_ratio=log_ratio, average=average, **terms)
