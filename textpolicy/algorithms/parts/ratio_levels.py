"""Ratio levels: whether the importance ratio is one of each token or one of a whole sequence."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
from jaxtyping import Bool, Float

from textpolicy.algorithms.parts.reductions import PerToken, row_means

Mask = Bool[mx.array, "batch time"]


@dataclass(frozen=True)
class RatioLevel:
    """Turns log-ratios of tokens into log-ratios of this level: ratio = exp(level(...)).

    `reduce` gets log-ratios that are 0 outside the mask. With `by_sequence`, metrics count each
    sequence once.
    """

    reduce: Callable[[Float[mx.array, "batch time"], Mask], PerToken]
    by_sequence: bool

    def __call__(self, log_ratios: Float[mx.array, "batch time"], mask: Mask) -> PerToken:
        return self.reduce(mx.where(mask, log_ratios, 0), mask)


TOKEN = RatioLevel(lambda logs, mask: logs, by_sequence=False)
"""The ratio of each token."""
SEQUENCE = RatioLevel(lambda logs, mask: row_means(logs, mask)[:, None], by_sequence=True)
"""One ratio for each sequence: the geometric mean of its tokens' ratios, as in GSPO."""
WHOLE_SEQUENCE = RatioLevel(lambda logs, mask: logs.sum(axis=1, keepdims=True), by_sequence=True)
"""One ratio for each sequence: the product of its tokens' ratios, as in RLOO."""
