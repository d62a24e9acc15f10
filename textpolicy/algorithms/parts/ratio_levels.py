"""Ratio levels: whether the importance ratio is one of each token or one of a whole sequence."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
from jaxtyping import Float

from textpolicy.algorithms.parts.reductions import PerToken, add_segments, sequence_means
from textpolicy.types import Batch

LogRatios = Float[mx.array, "batch time"]


@dataclass(frozen=True)
class RatioLevel:
    """Turns log-ratios of tokens into log-ratios of this level: ratio = exp(level(...)).

    `reduce` gets log-ratios that are 0 outside the mask. With `by_sequence`, metrics count each
    sequence once.
    """

    reduce: Callable[[LogRatios, Batch], PerToken]
    by_sequence: bool

    def __call__(self, log_ratios: LogRatios, batch: Batch) -> PerToken:
        return self.reduce(mx.where(batch.mask, log_ratios, 0), batch)


def _sequence_sums(logs: LogRatios, batch: Batch) -> PerToken:
    return add_segments(logs.sum(axis=1), batch)[:, None]


TOKEN = RatioLevel(lambda logs, batch: logs, by_sequence=False)
"""The ratio of each token."""
SEQUENCE = RatioLevel(lambda logs, batch: sequence_means(logs, batch)[:, None], by_sequence=True)
"""One ratio for each sequence: the geometric mean of its tokens' ratios, as in GSPO."""
WHOLE_SEQUENCE = RatioLevel(_sequence_sums, by_sequence=True)
"""One ratio for each sequence: the product of its tokens' ratios, as in RLOO."""
