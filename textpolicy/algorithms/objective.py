"""A policy's loss for each token, and what any algorithm's may be composed with.

    loss = average( weight_1 * .. * weight_k * token loss + beta * KL ) - entropy_bonus * entropy

Every algorithm's `policy_loss` takes these as keywords, and passes them here.
"""

from collections.abc import Callable, Sequence
from typing import TypedDict

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.averages import Average, token_mean
from textpolicy.algorithms.kl import KLEstimator, k3, kl_to_reference
from textpolicy.algorithms.ops import PerToken
from textpolicy.errors import ConfigError
from textpolicy.types import Batch

Loss = tuple[Float[mx.array, ""], dict[str, mx.array]]
"""What is minimised, and metrics."""
TokenWeight = Callable[[Float[mx.array, "batch time"], Batch], tuple[PerToken, dict[str, mx.array]]]
"""What multiplies each token's loss, without a gradient of its own, and metrics."""


class Terms(TypedDict, total=False):
    """What any policy loss can be composed with."""

    weights: Sequence[TokenWeight]
    """Corrections and selections that multiply the policy's part of the loss."""
    beta: float
    """Weight of the KL divergence from the reference."""
    kl: KLEstimator
    """How that divergence is estimated."""
    entropy_bonus: float
    """Weight of the mean entropy over all tokens, which is taken off the loss."""


def objective(
    loss: PerToken,
    metrics: dict[str, mx.array],
    logp: Float[mx.array, "batch time"],
    batch: Batch,
    *,
    log_ratio: PerToken,
    average: Average,
    weights: Sequence[TokenWeight] = (),
    beta: float = 0.0,
    kl: KLEstimator = k3,
    entropy_bonus: float = 0.0,
) -> Loss:
    """The batch's loss from each token's."""
    for weight in weights:
        factor, more = weight(logp, batch)
        loss, metrics = loss * mx.stop_gradient(factor), metrics | more
    if beta:
        estimate = kl_to_reference(logp, batch, log_ratio=log_ratio, estimator=kl)
        loss = loss + beta * estimate
    total = average(loss, batch)
    metrics = metrics | {"policy_loss": total}
    if entropy_bonus:
        total = total - entropy_bonus * _mean_entropy(batch)
    return total, metrics


def _mean_entropy(batch: Batch) -> Float[mx.array, ""]:
    if batch.entropy is None:
        raise ConfigError(
            "the loss has an entropy bonus and the batch has no entropy: train with a Trainer, or "
            "set Batch.entropy to that of the current policy"
        )
    return token_mean(batch.entropy, batch)
