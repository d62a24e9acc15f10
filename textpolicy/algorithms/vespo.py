"""Variational Sequence-level Soft Policy Optimization: arXiv:2602.10693.

    w_i = prod_t ratio_t
    phi(w) = e^lambda w^k e^(-lambda w)
    J = 1/sum_i |o_i| sum_i sum_t stop_gradient(phi(w_i)) A_i logp_t

A weight for the whole sequence that is 1 on policy and falls off on both sides, with (k, lambda)
chosen by the advantage's sign, takes the place of clipping. Advantages are GRPO's. A correction for
the sampler is part of w, as in the paper: it multiplies the ratios, not the loss. Departure: log w
is held between log 1e-8 and 20, as in the authors' code.
"""

import math
from typing import Unpack

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.averages import Average, token_mean
from textpolicy.algorithms.grpo import compute_advantages
from textpolicy.algorithms.objective import Loss, Terms, TokenWeight, objective
from textpolicy.algorithms.ops import PerToken, row_means
from textpolicy.algorithms.ratios import LogRatio, token_log_ratio
from textpolicy.types import Batch

__all__ = ["compute_advantages", "policy_loss"]

LOWEST, HIGHEST = math.log(1e-8), 20.0


def policy_loss(
    logp: Float[mx.array, "batch time"],
    batch: Batch,
    *,
    positive: tuple[float, float] = (2.0, 3.0),
    negative: tuple[float, float] = (3.0, 2.0),
    ratio: LogRatio = token_log_ratio,
    average: Average = token_mean,
    correction: TokenWeight | None = None,
    **terms: Unpack[Terms],
) -> Loss:
    """Log-probabilities weighed by advantage and phi(w), negated: the mean over tokens.

    `positive` and `negative` are (k, lambda) for advantages of that sign.
    """
    log_ratio = ratio(logp, batch).logs
    none = mx.ones((logp.shape[0], 1))
    weight, metrics = correction(logp, batch) if correction else (none, {})
    k, rate = (
        mx.where(batch.advantages >= 0, p, n) for p, n in zip(positive, negative, strict=True)
    )
    log_w = mx.clip(_log_product(logp, batch, weight), LOWEST, HIGHEST)
    phi = mx.stop_gradient(mx.exp(k * log_w - rate * mx.expm1(log_w)))
    loss = -phi * batch.advantages * mx.where(batch.mask, logp, 0)
    metrics = metrics | {"vespo/phi_seq_mean": row_means(phi, batch.mask).sum() / batch.rows}
    return objective(loss, metrics, logp, batch, log_ratio=log_ratio, average=average, **terms)


def _log_product(
    logp: Float[mx.array, "batch time"], batch: Batch, weight: PerToken
) -> Float[mx.array, "batch 1"]:
    """log w: over the sequence, of the ratios and of the sampler's correction."""
    ratios = mx.clip(token_log_ratio(logp, batch).logs, -20, 20).sum(axis=1, keepdims=True)
    logs = mx.clip(mx.log(weight), LOWEST, HIGHEST)
    if logs.shape[1] > 1:
        logs = mx.where(batch.mask, logs, 0)
    return ratios + logs.sum(axis=1, keepdims=True)
