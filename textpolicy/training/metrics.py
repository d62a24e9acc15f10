"""What a trainer reports, and how it adds up: micro-batches to an update, updates to a step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, pstdev

import mlx.core as mx
from jaxtyping import Float

from textpolicy.training.batch import TrainingRow
from textpolicy.types import Batch, Metrics


def policy_metrics(
    logp: Float[mx.array, "batch time"], entropy: Float[mx.array, "batch time"], batch: Batch
) -> dict[str, mx.array]:
    """Entropy, and distances from the sampler and the reference, in nats a token."""

    def mean(x: mx.array) -> mx.array:
        return mx.where(batch.mask, x, 0).sum() / batch.token_count

    off = mx.where(batch.mask, logp - batch.logp_sampled, 0)
    ratio = mx.exp(off)
    # Of a batch without a token that counts, all ratios are 1.
    counted = batch.mask | ~batch.mask.any()
    metrics = {
        "entropy": mean(entropy),
        "sampling/sampling_logp_difference/mean": mean(mx.abs(off)),
        "sampling/sampling_logp_difference/max": mx.abs(off).max(),
        "sampling/importance_sampling_ratio/mean": mean(ratio),
        "sampling/importance_sampling_ratio/min": mx.where(counted, ratio, mx.inf).min(),
        "sampling/importance_sampling_ratio/max": mx.where(counted, ratio, 0).max(),
        "sampling/mismatch_kl": mean(ratio - off - 1),
    }
    if batch.logp_ref is not None:
        away = mx.where(batch.mask, batch.logp_ref - logp, 0)
        metrics["kl"] = mean(mx.exp(away) - away - 1)
    return metrics


def advantage_metrics(rows: Sequence[TrainingRow]) -> Metrics:
    """The spread of the advantages over rollouts; their mean is 0 for most algorithms."""
    advantages = [row.advantage for row in rows]
    return {
        "advantages/std": pstdev(advantages),
        "advantages/min": min(advantages),
        "advantages/max": max(advantages),
    }


def sum_micro_batches(parts: Iterable[tuple[Mapping[str, float], bool]]) -> Metrics:
    """An update's metrics, of its micro-batches': sums, or extremes where the name says so.

    With each goes whether a token of it counts; without one, its extremes are those of nothing.
    """
    total: Metrics = {}
    for part, counts in sorted(parts, key=lambda pair: not pair[1]):
        for name, value in part.items():
            combine = _combine(name, sum)
            if name not in total:
                total[name] = value
            elif counts or combine is sum:
                total[name] = combine((total[name], value))
    return total


def average_updates(updates: Sequence[Metrics], *, with_sampler: bool) -> Metrics:
    """The mean over updates, or the extreme.

    What compares with the sampler is the first update's, before the policy has moved, and is left
    out where nothing was sampled.
    """
    first = {name: x for name, x in updates[0].items() if name.startswith("sampling/")}
    return {
        name: _combine(name, fmean)([update[name] for update in updates])
        for name in updates[0]
        if name not in first
    } | (first if with_sampler else {})


def _combine(
    name: str, otherwise: Callable[[Iterable[float]], float]
) -> Callable[[Iterable[float]], float]:
    if name.endswith("max"):
        return max
    return min if name.endswith("min") else otherwise
