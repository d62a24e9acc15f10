"""REINFORCE++: Hu et al. 2025, arXiv:2501.03262.

    A_i = (R_i - mean(R over all tokens of the batch)) / std(R over all tokens of the batch)

The baseline is the mean of the whole batch, so tasks that are sampled once have one too. An answer
counts in mean and standard deviation once for each of its tokens. Rewards are for whole answers,
without discount. Departure: the KL divergence is subtracted from the reward of the whole answer
(`reward_kl` of the trainer), not token by token. The loss is PPO's, over all tokens, as Lite PPO's.
"""

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms import lite_ppo
from textpolicy.algorithms.parts.declaration import Declaration
from textpolicy.algorithms.parts.reductions import GroupRewards

DECLARATION = Declaration(paper="2501.03262", needs_advantages=True)
policy_loss = lite_ppo.policy_loss


def compute_advantages(
    rewards: GroupRewards, *, lengths: Float[mx.array, "*groups group"], eps: float = 1e-8
) -> GroupRewards:
    """Return the rewards standardised over all tokens of the batch."""
    rewarded = ~mx.isnan(rewards)
    tokens = mx.where(rewarded, lengths, 0)
    count = mx.maximum(tokens.sum(), 1)
    # Measured from the lowest reward: equal rewards give exact zeros, not noise over eps.
    above = mx.where(rewarded, rewards - mx.where(rewarded, rewards, mx.inf).min(), 0)
    distance = mx.where(rewarded, above - (tokens * above).sum() / count, 0)
    variance = (tokens * mx.square(distance)).sum() / mx.maximum(count - 1, 1)
    return distance * mx.rsqrt(variance + eps)
