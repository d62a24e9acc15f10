"""Soft Adaptive Policy Optimization: Gao et al. 2025, arXiv:2511.20347, equations 5 and 6.

    f(ratio) = sigmoid(tau (ratio - 1)) 4 / tau,  tau = tau_positive where A > 0, else tau_negative
    J = 1/G sum_i 1/|o_i| sum_t f(ratio_t) A_i

A gate that closes gradually takes the place of the clip: its slope is 1 on policy, as the ratio's,
and falls to 0 with distance, faster for tokens of bad answers. Advantages are GRPO's.
"""

from typing import Unpack

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.averages import Average, sequence_mean
from textpolicy.algorithms.grpo import compute_advantages
from textpolicy.algorithms.objective import Loss, Terms, objective
from textpolicy.algorithms.ratios import LogRatio, token_log_ratio
from textpolicy.types import Batch

__all__ = ["compute_advantages", "policy_loss"]


def policy_loss(
    logp: Float[mx.array, "batch time"],
    batch: Batch,
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
    ratio: LogRatio = token_log_ratio,
    average: Average = sequence_mean,
    **terms: Unpack[Terms],
) -> Loss:
    """The gated surrogate, negated: each sequence's token mean, averaged over sequences."""
    log_ratio = ratio(logp, batch).logs
    tau = mx.where(batch.advantages > 0, tau_positive, tau_negative)
    gate = mx.sigmoid(tau * (mx.exp(log_ratio) - 1)) * 4 / tau
    loss = -gate * batch.advantages
    return objective(loss, {}, logp, batch, log_ratio=log_ratio, average=average, **terms)
