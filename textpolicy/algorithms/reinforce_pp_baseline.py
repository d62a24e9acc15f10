"""REINFORCE++ with a group baseline: Hu et al. 2025, arXiv:2501.03262.

    B_i = R_i - mean(R of its group)
    A_i = (B_i - mean(B over all tokens of the batch)) / std(B over all tokens of the batch)

The group's mean is subtracted before REINFORCE++ standardises. The loss is that of REINFORCE++.
"""

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms import reinforce_pp
from textpolicy.algorithms.parts.declaration import Declaration
from textpolicy.algorithms.parts.reductions import GroupRewards, center

DECLARATION = Declaration(paper="2501.03262", needs_advantages=True)
policy_loss = reinforce_pp.policy_loss


def compute_advantages(
    rewards: GroupRewards, *, lengths: Float[mx.array, "*groups group"], eps: float = 1e-8
) -> GroupRewards:
    """Return each reward less its group's mean, standardised over all tokens of the batch."""
    centered = mx.where(mx.isnan(rewards), mx.nan, center(rewards))
    return reinforce_pp.compute_advantages(centered, lengths=lengths, eps=eps)
