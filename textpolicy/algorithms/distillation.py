"""On-policy distillation: Agarwal et al. 2024, arXiv:2306.13649; Lu et al. 2025, On-Policy
Distillation. The student learns from a teacher's log-probabilities of the student's own samples.

    A_t = weight (log p_teacher(token_t) - log p_old(token_t))
    J = 1/sum_i |o_i| sum_i sum_t ratio_t A_t

The expected gradient is that of -KL(student || teacher), token by token. The teacher is the
trainer's `reference`: another model with the same vocabulary. Rewards are not used.
"""

from dataclasses import replace
from typing import Unpack

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms import reinforce
from textpolicy.algorithms.parts.declaration import Declaration
from textpolicy.algorithms.parts.loss import Loss, LossOptions
from textpolicy.algorithms.parts.reductions import GroupRewards
from textpolicy.errors import ConfigError
from textpolicy.types import Batch

DECLARATION = Declaration(paper="2306.13649", needs_teacher=True)


def compute_advantages(rewards: GroupRewards) -> GroupRewards:
    """Return 1 for every rollout; the loss takes the advantage of each token from the teacher."""
    return mx.ones_like(rewards)


def policy_loss(
    logp: Float[mx.array, "batch time"],
    batch: Batch,
    *,
    weight: float = 1.0,
    **options: Unpack[LossOptions],
) -> Loss:
    """Return REINFORCE's loss with the teacher's advantages: its mean over all tokens."""
    if batch.logp_ref is None:
        raise ConfigError(
            "distillation needs a teacher; pass it to the trainer, Trainer(..., reference=teacher)"
        )
    advantages = weight * mx.where(batch.mask, batch.logp_ref - batch.logp_old, 0)
    return reinforce.policy_loss(logp, replace(batch, advantages=advantages), **options)
