"""Estimates of KL(policy || reference) from the policy's own samples.

With d = log p_ref - log p (Schulman 2020, Approximating KL Divergence):

    k1 = -d             unbiased, may be negative; as a loss it has no useful gradient
    k2 = d^2 / 2        biased value; its gradient is that of the divergence
    k3 = e^d - d - 1    unbiased and positive; its gradient is not that of the divergence

`unbiased_k3` is k3 times the importance ratio: DeepSeek-V3.2, arXiv:2512.02556, section 3.1, whose
gradient is that of the divergence, on and off policy. d is held to +-20: beyond it e^d overflows.
"""

from collections.abc import Callable

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.ops import PerToken
from textpolicy.errors import ConfigError
from textpolicy.types import Batch

Distance = Float[mx.array, "batch time"]
Ratio = PerToken
KLEstimator = Callable[[Distance, Ratio], Distance]


def k1(distance: Distance, ratio: Ratio) -> Distance:
    """-d."""
    return -distance


def k2(distance: Distance, ratio: Ratio) -> Distance:
    """d^2 / 2."""
    return mx.square(distance) / 2


def k3(distance: Distance, ratio: Ratio) -> Distance:
    """e^d - d - 1."""
    return mx.exp(distance) - distance - 1


def unbiased_k3(distance: Distance, ratio: Ratio) -> Distance:
    """k3 times the importance ratio of the loss it is part of."""
    return k3(distance, ratio) * ratio


def kl_to_reference(
    logp: Float[mx.array, "batch time"],
    batch: Batch,
    *,
    log_ratio: PerToken,
    estimator: KLEstimator,
) -> Distance:
    """The estimate at each token; 0 outside the mask."""
    if batch.logp_ref is None:
        raise ConfigError(
            "the loss has a KL term and the batch has no reference: give the trainer one with "
            "Trainer(..., reference='base'), or set beta to 0"
        )
    distance = mx.clip(mx.where(batch.mask, batch.logp_ref - logp, 0), -20, 20)
    return estimator(distance, mx.exp(log_ratio))
