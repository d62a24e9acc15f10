"""Compare two policies on the same tasks: the mean gain, its interval, and where answers differ."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from textpolicy.environments.chat import prompt_text
from textpolicy.errors import ConfigError
from textpolicy.evaluation.evaluate import Evaluation
from textpolicy.types import Task

_RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class TaskDifference:
    """The greedy answers of two policies to one task, with their rewards."""

    prompt: str
    before: str
    after: str
    reward_before: float
    reward_after: float

    @property
    def gain(self) -> float:
        """The reward of the second policy minus the reward of the first."""
        return self.reward_after - self.reward_before


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The mean gain over `count` tasks, with a 95 % interval from `low` to `high`.

    The interval is a paired bootstrap: the middle 95 % of the mean gains, when the tasks are drawn
    10,000 times with replacement.
    """

    gain: float
    low: float
    high: float
    count: int
    differences: Sequence[TaskDifference]

    @property
    def better(self) -> int:
        """The number of tasks on which the second policy has the higher reward."""
        return sum(difference.gain > 0 for difference in self.differences)

    @property
    def worse(self) -> int:
        """The number of tasks on which the second policy has the lower reward."""
        return len(self.differences) - self.better

    def __str__(self) -> str:
        return f"{self.gain:+.3f}, 95 % interval {self.low:+.3f} to {self.high:+.3f}"


def compare(tasks: Sequence[Task], before: Evaluation, after: Evaluation) -> Comparison:
    """Compare the greedy answers of two evaluations on the same tasks.

    Differences are sorted by size, the largest first. A task is left out if its reward is None in
    one of the evaluations.
    """
    scored = pair_answers(tasks, before, after)
    if not scored:
        raise ConfigError(
            "there is nothing to compare: no task has a reward under both policies. Use a reward "
            "function that returns a number"
        )
    gains = [difference.gain for difference in scored]
    low, high = bootstrap_interval(gains)
    return Comparison(
        gain=float(np.mean(gains)),
        low=low,
        high=high,
        count=len(scored),
        differences=sorted(
            (difference for difference in scored if difference.gain),
            key=lambda difference: -abs(difference.gain),
        ),
    )


def pair_answers(
    tasks: Sequence[Task], before: Evaluation, after: Evaluation
) -> list[TaskDifference]:
    """Return the greedy answers of two evaluations to each task with a reward in both.

    Tasks with equal rewards are among them.
    """
    return [
        TaskDifference(
            prompt=prompt_text(task.prompt),
            before=one.completion,
            after=other.completion,
            reward_before=one.reward,
            reward_after=other.reward,
        )
        for task, one, other in zip(tasks, before.greedy, after.greedy, strict=True)
        if one.reward is not None and other.reward is not None
    ]


def bootstrap_interval(gains: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of the mean of `gains`, by drawing them with replacement."""
    values, counts = np.unique(np.asarray(gains, dtype=np.float64), return_counts=True)
    shares = counts / len(gains)
    # Drawing how often each different gain occurs gives the same means as drawing task by task.
    drawn = np.random.default_rng(seed).multinomial(len(gains), shares, size=_RESAMPLES)
    means = drawn @ values / len(gains)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
