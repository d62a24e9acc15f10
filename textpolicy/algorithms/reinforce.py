"""REINFORCE with importance sampling: Williams 1992, Simple statistical gradient-following
algorithms, with the ratio as the weight of samples from an older policy.

    J = 1/sum_i |o_i| sum_i sum_t ratio_t A_i

Nothing is clipped: it is the gradient itself, right on policy and of growing variance away from it.
The baseline is the group's mean, as in Dr. GRPO.
"""

from typing import Unpack

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.averages import Average, token_mean
from textpolicy.algorithms.dr_grpo import compute_advantages
from textpolicy.algorithms.objective import Loss, Terms, objective
from textpolicy.algorithms.ratios import LogRatio, token_log_ratio
from textpolicy.types import Batch

__all__ = ["compute_advantages", "policy_loss"]


def policy_loss(
    logp: Float[mx.array, "batch time"],
    batch: Batch,
    *,
    ratio: LogRatio = token_log_ratio,
    average: Average = token_mean,
    **terms: Unpack[Terms],
) -> Loss:
    """Ratio times advantage, negated: the mean over all tokens of the whole batch."""
    log_ratio = ratio(logp, batch).logs
    loss = -mx.exp(log_ratio) * batch.advantages
    return objective(loss, {}, logp, batch, log_ratio=log_ratio, average=average, **terms)
