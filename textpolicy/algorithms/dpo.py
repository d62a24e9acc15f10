"""Direct Preference Optimization: Rafailov et al. 2023, arXiv:2305.18290, equation 7.

    h(y) = log p(y) - log p_ref(y)
    loss = -mean over pairs of log sigmoid(beta (h(chosen) - h(rejected)))

A group is a pair: its advantages are +1 for what was chosen and -1 for what was rejected, so any
two rewards that differ will do, and a pair of equals teaches nothing. The reference is the
trainer's, usually the model without its adapters. Pairs are kept whole by micro-batches of even
size. Departure: `label_smoothing` of conservative DPO (Mitchell 2023), the chance that a label is
wrong, is 0 unless given.
"""

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Integer

from textpolicy.algorithms.objective import Loss
from textpolicy.algorithms.ops import Rewards
from textpolicy.errors import ConfigError
from textpolicy.types import Batch


def compute_advantages(rewards: Rewards) -> Rewards:
    """+1 for the better of each pair and -1 for the other; 0 for equals, or without a reward."""
    if rewards.shape[-1] != 2:
        raise ConfigError(
            f"groups have {rewards.shape[-1]} members; expected pairs, "
            "one chosen and one rejected: set group_size to 2"
        )
    difference = rewards - rewards[..., ::-1]
    return mx.where(mx.isnan(difference), 0, mx.sign(difference))


def policy_loss(
    logp: Float[mx.array, "batch time"],
    batch: Batch,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Loss:
    """The negative log-likelihood of the preferences: its mean over pairs."""
    if batch.logp_ref is None:
        raise ConfigError("DPO needs a reference: Trainer(..., reference='base')")
    gain = beta * mx.where(batch.mask, logp - batch.logp_ref, 0).sum(axis=1)
    order = _in_pairs(batch)
    # A pair of equals has no winner: its difference counts for nothing.
    decided = (batch.advantages[order].sum(axis=1) != 0).astype(mx.float32)
    chosen, rejected = (gain[order] * decided).reshape(-1, 2).T
    margin = chosen - rejected
    likelihood = (1 - label_smoothing) * nn.log_sigmoid(margin)
    likelihood = likelihood + label_smoothing * nn.log_sigmoid(-margin)
    likelihood = likelihood * decided[::2]
    pairs = batch.rows / 2
    return -likelihood.sum() / pairs, {
        "rewards/chosen": chosen.sum() / pairs,
        "rewards/rejected": rejected.sum() / pairs,
        "rewards/margins": margin.sum() / pairs,
        "rewards/accuracies": (margin > 0).sum() / pairs,
    }


def _in_pairs(batch: Batch) -> Integer[mx.array, " batch"]:
    """The order of rows in which each pair is together, the chosen one first."""
    lost = batch.advantages.sum(axis=1) < 0
    order = mx.argsort(2 * batch.group + lost)
    group = batch.group[order]
    if len(group) % 2 or not mx.array_equal(group[::2], group[1::2]):
        raise ConfigError(
            "a micro-batch has one half of a pair without the other; expected an even "
            "micro_batch_size, and both halves with at least one token that counts"
        )
    return order
