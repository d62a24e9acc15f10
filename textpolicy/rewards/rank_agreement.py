"""How far two orders of the same answers agree: by pairs, and by the correlation of ranks."""

from dataclasses import dataclass
from typing import Any

import numpy as np

Numbers = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
_RESAMPLES = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PairAgreement:
    """Pairs of answers whose labels differ, and how the reward orders them.

    `share` counts the pairs that both order `alike`, and half of those with `equal` rewards. A
    guess has 0.5. The interval from `low` to `high` holds 95 % of the shares, when answers are
    drawn 1,000 times with replacement.
    """

    pairs: int
    alike: int
    equal: int
    share: float
    low: float
    high: float

    def __str__(self) -> str:
        return (
            f"{self.share:.2f}, 95 % interval {self.low:.2f} to {self.high:.2f}: of {self.pairs} "
            f"pairs, {self.alike} alike, {self.equal} with equal rewards, "
            f"{self.pairs - self.alike - self.equal} the other way"
        )


def pair_agreement(
    labels: Numbers, rewards: Numbers, allowed: np.ndarray[Any, np.dtype[np.bool_]]
) -> PairAgreement | None:
    """Return how rewards order the allowed pairs with different labels; None if there are none."""
    by_label = np.sign(labels[:, None] - labels[None, :])
    by_reward = np.sign(rewards[:, None] - rewards[None, :])
    counted = (allowed & (by_label != 0)).astype(np.float64)
    alike = counted * (by_label == by_reward)
    equal = counted * (by_reward == 0)
    if not counted.any():
        return None
    good = alike + equal / 2
    drawn = np.random.default_rng(0).multinomial(
        len(labels), np.full(len(labels), 1 / len(labels)), size=_RESAMPLES
    )
    # An answer that is drawn twice counts twice in its pairs.
    pairs = ((drawn @ counted) * drawn).sum(axis=1)
    shares = ((drawn @ good) * drawn).sum(axis=1)[pairs > 0] / pairs[pairs > 0]
    low, high = np.quantile(shares, [0.025, 0.975])
    # Each pair is twice in a matrix.
    return PairAgreement(
        pairs=int(counted.sum()) // 2,
        alike=int(alike.sum()) // 2,
        equal=int(equal.sum()) // 2,
        share=float(good.sum() / counted.sum()),
        low=float(low),
        high=float(high),
    )


def rank_correlation(labels: Numbers, rewards: Numbers) -> float | None:
    """Return Spearman's correlation, or None if all labels or all rewards are equal."""
    one, other = ranks_of(labels), ranks_of(rewards)
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(np.corrcoef(one, other)[0, 1])


def ranks_of(values: Numbers) -> Numbers:
    """Return the rank of each value; equal values share the mean of their ranks."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[places]
