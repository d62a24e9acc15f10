"""REINFORCE Leave-One-Out: Ahmadian et al. 2024, Back to Basics, arXiv:2402.14740.

    A_i = R_i - 1/(n - 1) sum_{j != i} R_j = n/(n - 1) (R_i - mean(R))

Departures: this is the baseline alone. With `grpo.policy_loss` its first update of a batch is
REINFORCE's; the paper's penalty for leaving the reference policy is not part of the reward here.
"""

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.ops import center, check_group_size


def compute_advantages(
    rewards: Float[mx.array, "*groups group"],
) -> Float[mx.array, "*groups group"]:
    """Each reward less the mean of the others of its group; NaN (no reward) counts for none."""
    check_group_size(rewards)
    count = (~mx.isnan(rewards)).sum(axis=-1, keepdims=True)
    return center(rewards) * count / mx.maximum(count - 1, 1)
