"""Metrics of the trainer: of a micro-batch, of an update, and of a training step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from textpolicy.training.batch import TrainingRow, rows_by_rollout
from textpolicy.types import Batch, Metrics


def policy_metrics(
    logp: Float[mx.array, "batch time"], entropy: Float[mx.array, "batch time"], batch: Batch
) -> dict[str, mx.array]:
    """Return entropy and the distances from the sampler and the reference, in nats a token."""
    mean = partial(_token_mean, batch)
    difference = mx.where(batch.mask, logp - batch.logp_sampled, 0)
    ratio = mx.exp(difference)
    # In a batch without any counted token, all ratios are 1.
    counted = batch.mask | ~batch.mask.any()
    metrics = {
        "entropy": mean(entropy),
        "sampling/sampling_logp_difference/mean": mean(mx.abs(difference)),
        "sampling/sampling_logp_difference/max": mx.abs(difference).max(),
        "sampling/importance_sampling_ratio/mean": mean(ratio),
        "sampling/importance_sampling_ratio/min": mx.where(counted, ratio, mx.inf).min(),
        "sampling/importance_sampling_ratio/max": mx.where(counted, ratio, 0).max(),
        "sampling/mismatch_kl": mean(ratio - difference - 1),
    }
    if batch.logp_ref is not None:
        difference = mx.where(batch.mask, batch.logp_ref - logp, 0)
        metrics["kl"] = mean(mx.exp(difference) - difference - 1)
    return metrics


def _token_mean(batch: Batch, x: mx.array) -> mx.array:
    return mx.where(batch.mask, x, 0).sum() / batch.token_count


def advantage_metrics(rows: Sequence[TrainingRow]) -> Metrics:
    """Return the spread of the rollouts' advantages. Their mean is 0 in most algorithms."""
    advantages = np.array([segments[0].advantage for segments in rows_by_rollout(rows)])
    # A user's function may return any number, and the metrics show it: NaN and infinity too.
    with np.errstate(all="ignore"):
        return {
            "advantages/std": float(np.std(advantages)),
            "advantages/min": float(np.min(advantages)),
            "advantages/max": float(np.max(advantages)),
        }


def sum_micro_batches(parts: Iterable[tuple[Mapping[str, float], bool]]) -> Metrics:
    """Return an update's metrics from those of its micro-batches: sums, or extremes by their names.

    Each micro-batch comes with whether it has a counted token. If not, its extremes are ignored.
    """
    total: Metrics = {}
    for part, has_tokens in sorted(parts, key=lambda pair: not pair[1]):
        for name, value in part.items():
            combine = _extreme_of(name) or sum
            if name not in total:
                total[name] = value
            elif has_tokens or combine is sum:
                total[name] = combine((total[name], value))
    return total


def average_updates(updates: Sequence[Metrics], *, with_sampler: bool) -> Metrics:
    """Return the metrics of a step: means over its updates, or extremes by their names.

    Comparisons with the sampler are taken from the first update, before the policy moved. They are
    left out if `with_sampler` is False.
    """
    first = {name: x for name, x in updates[0].items() if name.startswith("sampling/")}
    return {
        name: (_extreme_of(name) or _mean)([update[name] for update in updates])
        for name in updates[0]
        if name not in first
    } | (first if with_sampler else {})


def _mean(values: Sequence[float]) -> float:
    # `statistics.fmean` raises for infinities of both signs.
    with np.errstate(all="ignore"):
        return float(np.mean(values))


def _extreme_of(name: str) -> Callable[[Iterable[float]], float] | None:
    if name.endswith("max"):
        return max
    return min if name.endswith("min") else None
