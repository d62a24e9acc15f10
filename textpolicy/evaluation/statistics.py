"""Numbers of an evaluation: a mean with its error, and how often one of k answers is right."""

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
        """Of at least one reward."""
        return cls(
            reward=float(np.mean(rewards)),
            standard_error=float(np.std(rewards) / np.sqrt(len(rewards))),
            count=len(rewards),
        )

    def __str__(self) -> str:
        return f"{self.reward:.3f} ± {self.standard_error:.3f}"


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that one of `k` answers is right, when `right` of `samples` answers were.

    The unbiased estimator of Chen et al. 2021, arXiv:2107.03374: the share of all choices of k
    among the samples that hold a right one.
    """
    return 1 - comb(samples - right, k) / comb(samples, k)
