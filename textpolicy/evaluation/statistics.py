"""Statistics of an evaluation: the mean reward with its standard error, and pass@k."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np


@dataclass(frozen=True, kw_only=True)
class MeanReward:
    """The mean reward of greedy completions over `count` tasks."""

    reward: float
    standard_error: float
    count: int

    @classmethod
    def of(cls, rewards: Sequence[float]) -> "MeanReward":
        """Return the mean of at least one reward."""
        return cls(
            reward=float(np.mean(rewards)),
            standard_error=float(np.std(rewards) / np.sqrt(len(rewards))),
            count=len(rewards),
        )

    def __str__(self) -> str:
        return f"{self.reward:.3f} ± {self.standard_error:.3f}"


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return the probability that at least one of `k` answers is right.

    This is the unbiased estimator of Chen et al. 2021, arXiv:2107.03374: of all choices of `k`
    among `samples` answers, of which `right` are right, the share with a right answer.
    """
    return 1 - comb(samples - right, k) / comb(samples, k)
