"""Soft Adaptive Policy Optimization: Gao et al. 2025, arXiv:2511.20347, equations 5 and 6.

    ratio_t = exp(logp_t - logp_old_t)
    gate(r) = sigmoid(tau (r - 1)) 4 / tau,  tau = tau_positive where A > 0, else tau_negative
    J = 1/G sum_i 1/|o_i| sum_t gate(ratio_t) A_i

A gate that closes gradually replaces the clip. On policy the slope of the gate is 1, like the slope
of the ratio. The slope falls to 0 as the ratio leaves 1, and it falls faster for tokens with a
negative advantage. Advantages are GRPO's.
"""

from typing import Unpack

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms import grpo
from textpolicy.algorithms.parts.averages import Average, sequence_mean
from textpolicy.algorithms.parts.declaration import Declaration
from textpolicy.algorithms.parts.loss import Loss, LossOptions, compose_loss
from textpolicy.algorithms.parts.ratio_levels import TOKEN, RatioLevel
from textpolicy.types import Batch

DECLARATION = Declaration(paper="2511.20347", needs_advantages=True)
compute_advantages = grpo.compute_advantages


def policy_loss(
    logp: Float[mx.array, "batch time"],
    batch: Batch,
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
    ratio_level: RatioLevel = TOKEN,
    average: Average = sequence_mean,
    **options: Unpack[LossOptions],
) -> Loss:
    """Return the negated gated surrogate: its mean over tokens, then over sequences."""
    ratio = mx.exp(ratio_level(logp - batch.logp_old, batch))
    tau = mx.where(batch.advantages > 0, tau_positive, tau_negative)
    gate = mx.sigmoid(tau * (ratio - 1)) * 4 / tau
    surrogate = gate * batch.advantages
    return compose_loss(-surrogate, logp, batch, ratio, average, **options)
