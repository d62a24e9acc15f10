"""Group Relative Policy Optimization: DeepSeekMath, Shao et al. 2024, arXiv:2402.03300, 4.1.

For a group of G completions of one prompt with rewards R_1..R_G (equation 3, outcome supervision):

    A_i = (R_i - mean(R)) / (std(R) + eps)
    ratio_t = exp(logp_t - logp_old_t)
    J = 1/G sum_i 1/|o_i| sum_t min(ratio_t A_i, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_i)

Departures: the group is the last axis and never mixes with another; std has n - 1 and eps = 1e-4,
as the libraries that people compare with; the KL term of equation 3 is a separate loss term.
"""

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.ops import center, group_std, masked_sum, sum_of_row_means
from textpolicy.errors import ConfigError
from textpolicy.types import Batch


def compute_advantages(
    rewards: Float[mx.array, "*groups group"], *, eps: float = 1e-4
) -> Float[mx.array, "*groups group"]:
    """Rewards standardised inside each group; NaN (no reward) is left out and gets 0."""
    if rewards.shape[-1] < 2:
        raise ConfigError(
            f"group size is {rewards.shape[-1]}; expected at least 2: a completion is only better "
            "or worse than others of the same prompt"
        )
    return center(rewards) / (group_std(rewards) + eps)


def policy_loss(
    logp: Float[mx.array, "batch time"],
    batch: Batch,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Float[mx.array, ""], dict[str, mx.array]]:
    """The clipped surrogate, negated: each sequence's token mean, averaged over sequences."""
    ratio = mx.exp(mx.where(batch.mask, logp - batch.logp_old, 0))
    clipped = mx.clip(ratio, 1 - clip_low, 1 + clip_high)
    surrogate = mx.minimum(ratio * batch.advantages, clipped * batch.advantages)
    loss = -sum_of_row_means(surrogate, batch.mask) / batch.rows

    low = (ratio < 1 - clip_low) & (batch.advantages < 0)
    high = (ratio > 1 + clip_high) & (batch.advantages > 0)
    metrics = {
        "clip_ratio/low_mean": masked_sum(low.astype(mx.float32), batch.mask) / batch.token_count,
        "clip_ratio/high_mean": masked_sum(high.astype(mx.float32), batch.mask) / batch.token_count,
    }
    metrics["clip_ratio/region_mean"] = (
        metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"]
    )
    return loss, metrics
