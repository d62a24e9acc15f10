"""Direct Preference Optimization: Rafailov et al. 2023, arXiv:2305.18290, equation 7.

    h(y) = beta (log p(y) - log p_ref(y))
    loss = -mean over pairs of log sigmoid(h(chosen) - h(rejected))

A group is a pair. Its advantages are +1 for the chosen and -1 for the rejected completion, so any
two rewards that differ will do, and a pair with equal rewards teaches nothing. The reference is the
trainer's, usually the model without its adapters. Micro-batches need an even number of rows.
Departure: `label_smoothing`, the chance that a label is wrong, is that of Mitchell 2023; 0 is off.
"""

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Integer

from textpolicy.algorithms.parts.declaration import Declaration
from textpolicy.algorithms.parts.loss import Loss
from textpolicy.algorithms.parts.reductions import GroupRewards, add_segments, first_rows
from textpolicy.errors import ConfigError
from textpolicy.types import Batch

DECLARATION = Declaration(paper="2305.18290", needs_advantages=True, trainer={"reference": "base"})


def compute_advantages(rewards: GroupRewards) -> GroupRewards:
    """Return +1 for the better of each pair and -1 for the other; 0 for equal rewards."""
    if rewards.shape[-1] != 2:
        raise ConfigError(
            f"groups have {rewards.shape[-1]} members; DPO expects pairs of a chosen and a "
            "rejected completion, so set group_size to 2"
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
    """Return the negative log-likelihood of the preferences: its mean over pairs."""
    if batch.logp_ref is None:
        raise ConfigError("DPO needs a reference; use Trainer(..., reference='base')")
    distances = mx.where(batch.mask, logp - batch.logp_ref, 0).sum(axis=1)
    h = beta * add_segments(distances, batch)
    signs = mx.sign(add_segments(batch.advantages.sum(axis=1), batch))
    order = _pair_order(batch, signs)
    # A pair with equal rewards has no winner: its difference counts for nothing.
    decided = (signs[order] != 0).astype(mx.float32)
    chosen, rejected = (h[order] * decided).reshape(-1, 2).T
    margin = chosen - rejected
    likelihood = (1 - label_smoothing) * nn.log_sigmoid(margin)
    likelihood = likelihood + label_smoothing * nn.log_sigmoid(-margin)
    pairs = batch.rows / 2
    return -(likelihood * decided[::2]).sum() / pairs, {
        "rewards/chosen": chosen.sum() / pairs,
        "rewards/rejected": rejected.sum() / pairs,
        "rewards/margins": margin.sum() / pairs,
        "rewards/accuracies": (margin > 0).sum() / pairs,
    }


def _pair_order(
    batch: Batch, signs: Float[mx.array, " batch"]
) -> Integer[mx.array, " completions"]:
    """Return a row of each completion, pair by pair, the chosen completion first."""
    first = first_rows(batch)
    group = batch.group[first]
    order = mx.argsort(2 * group + (signs[first] < 0))
    group = group[order]
    if len(group) % 2 or not mx.array_equal(group[::2], group[1::2]):
        raise ConfigError(
            "a micro-batch has one completion of a pair without the other; expected an even "
            "micro_batch_size, and both halves with at least one token that counts"
        )
    return first[order]
