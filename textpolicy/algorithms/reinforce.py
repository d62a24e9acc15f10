"""REINFORCE with importance sampling: Williams 1992, doi:10.1007/BF00992696.

    A_i = R_i - mean(R)
    ratio_t = exp(logp_t - logp_old_t)
    J = 1/sum_i |o_i| sum_i sum_t ratio_t A_i

The ratio is the weight of samples from an older policy. Nothing is clipped: this is the gradient
itself, exact on policy, with a variance that grows away from it. Advantages are Dr. GRPO's.
"""

from typing import Unpack

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms import dr_grpo
from textpolicy.algorithms.parts.averages import Average, token_mean
from textpolicy.algorithms.parts.declaration import Declaration
from textpolicy.algorithms.parts.loss import Loss, LossOptions, compose_loss
from textpolicy.algorithms.parts.ratio_levels import TOKEN, RatioLevel
from textpolicy.types import Batch

DECLARATION = Declaration(paper="Williams 1992", needs_advantages=True)
compute_advantages = dr_grpo.compute_advantages


def policy_loss(
    logp: Float[mx.array, "batch time"],
    batch: Batch,
    *,
    ratio_level: RatioLevel = TOKEN,
    average: Average = token_mean,
    **options: Unpack[LossOptions],
) -> Loss:
    """Return the negated ratio times advantage: its mean over all tokens of the batch."""
    ratio = mx.exp(ratio_level(logp - batch.logp_old, batch))
    surrogate = ratio * batch.advantages
    return compose_loss(-surrogate, logp, batch, ratio, average, **options)
