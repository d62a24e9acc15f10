"""On-policy distillation: Agarwal et al. 2024, arXiv:2306.13649; Lu et al. 2025, On-Policy
Distillation: learn from a teacher's opinion of what the student itself says.

    A_t = weight (log p_teacher(token_t) - log p_old(token_t))
    J = 1/sum_i |o_i| sum_i sum_t ratio_t A_t

Its expected gradient is that of -KL(student || teacher), token by token. The teacher is the
trainer's `reference`: another model with the same vocabulary. Rewards are not looked at.
"""

from dataclasses import replace
from typing import Unpack

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms import reinforce
from textpolicy.algorithms.objective import Loss, Terms
from textpolicy.algorithms.ops import Rewards
from textpolicy.errors import ConfigError
from textpolicy.types import Batch


def compute_advantages(rewards: Rewards) -> Rewards:
    """1 for every rollout: what its tokens are worth is for the teacher to say."""
    return mx.ones_like(rewards)


def policy_loss(
    logp: Float[mx.array, "batch time"],
    batch: Batch,
    *,
    weight: float = 1.0,
    **terms: Unpack[Terms],
) -> Loss:
    """REINFORCE with the teacher's advantage at each token: the mean over all tokens."""
    if batch.logp_ref is None:
        raise ConfigError(
            "distillation needs a teacher: pass it to the trainer, Trainer(..., reference=teacher)"
        )
    advantages = weight * mx.where(batch.mask, batch.logp_ref - batch.logp_old, 0)
    loss, metrics = reinforce.policy_loss(logp, replace(batch, advantages=advantages), **terms)
    return loss, metrics
