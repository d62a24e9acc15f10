"""Estimates of KL(policy || reference) from the policy's own samples.

With d = log p_ref - log p (Schulman 2020, Approximating KL Divergence):

    k1 = -d             unbiased, may be negative; as a loss it has no useful gradient
    k2 = d^2 / 2        biased value; its gradient is that of the divergence
    k3 = e^d - d - 1    unbiased and positive; its gradient is not that of the divergence

`unbiased_k3` is k3 times the importance ratio: DeepSeek-V3.2, arXiv:2512.02556, section 3.1. Its
gradient is that of the divergence, on and off policy.
"""

from collections.abc import Callable

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.parts.reductions import PerToken

LogDistance = Float[mx.array, "batch time"]
KLEstimator = Callable[[LogDistance, PerToken], LogDistance]


def k1(distance: LogDistance, ratio: PerToken) -> LogDistance:
    """Return -d."""
    return -distance


def k2(distance: LogDistance, ratio: PerToken) -> LogDistance:
    """Return d^2 / 2."""
    return mx.square(distance) / 2


def k3(distance: LogDistance, ratio: PerToken) -> LogDistance:
    """Return e^d - d - 1."""
    return mx.exp(distance) - distance - 1


def unbiased_k3(distance: LogDistance, ratio: PerToken) -> LogDistance:
    """Return e^d - d - 1, times the importance ratio of the loss."""
    return k3(distance, ratio) * ratio
