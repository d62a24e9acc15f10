"""Variational Sequence-level Soft Policy Optimization: arXiv:2602.10693.

    w_i = prod_t ratio_t
    phi(w) = e^lambda w^k e^(-lambda w)
    J = 1/sum_i |o_i| sum_i sum_t stop_gradient(phi(w_i)) A_i logp_t

A weight for the whole sequence takes the place of clipping. It is 1 on policy and falls off on both
sides, with (k, lambda) by the sign of the advantage. Advantages are GRPO's. `correction` is a token
weight for the sampler; it multiplies the ratios, not the loss, as in the paper. Departure: log w is
clipped to log 1e-8 and 20, as in the authors' code.
"""

import math
from typing import Unpack

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms import grpo
from textpolicy.algorithms.parts.averages import Average, token_mean
from textpolicy.algorithms.parts.declaration import Declaration
from textpolicy.algorithms.parts.loss import Loss, LossOptions, TokenWeight, compose_loss
from textpolicy.algorithms.parts.ratio_levels import TOKEN, RatioLevel
from textpolicy.algorithms.parts.reductions import add_segments, mean_of_sequences
from textpolicy.types import Batch

DECLARATION = Declaration(paper="2602.10693", needs_advantages=True)
compute_advantages = grpo.compute_advantages
_LOWEST, _HIGHEST = math.log(1e-8), 20.0


def policy_loss(
    logp: Float[mx.array, "batch time"],
    batch: Batch,
    *,
    positive: tuple[float, float] = (2.0, 3.0),
    negative: tuple[float, float] = (3.0, 2.0),
    ratio_level: RatioLevel = TOKEN,
    average: Average = token_mean,
    correction: TokenWeight | None = None,
    **options: Unpack[LossOptions],
) -> Loss:
    """Return the negated log-probabilities times advantage and phi(w): their mean over tokens.

    `positive` and `negative` are (k, lambda) for advantages of that sign.
    """
    log_ratios = mx.clip(TOKEN(logp - batch.logp_old, batch), -20, 20)
    log_w, metrics = add_segments(log_ratios.sum(axis=1), batch)[:, None], {}
    if correction:
        weight, metrics = correction(logp, batch)
        logs = mx.clip(mx.log(weight), _LOWEST, _HIGHEST)
        if logs.shape[1] > 1:
            logs = mx.where(batch.mask, logs, 0).sum(axis=1)
            logs = add_segments(logs, batch)[:, None]
        log_w = log_w + logs
    log_w = mx.clip(log_w, _LOWEST, _HIGHEST)
    k = mx.where(batch.advantages >= 0, positive[0], negative[0])
    rate = mx.where(batch.advantages >= 0, positive[1], negative[1])
    phi = mx.stop_gradient(mx.exp(k * log_w - rate * mx.expm1(log_w)))
    objective = phi * batch.advantages * mx.where(batch.mask, logp, 0)
    metrics = metrics | {"vespo/phi_seq_mean": mean_of_sequences(phi, batch)}
    ratio = mx.exp(ratio_level(logp - batch.logp_old, batch))
    return compose_loss(-objective, logp, batch, ratio, average, metrics, **options)
