"""Two policies on the same tasks: by how much one is better, how sure that is, and where."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from textpolicy.environments.single_turn import prompt_text
from textpolicy.errors import ConfigError
from textpolicy.evaluation.evaluate import Evaluation
from textpolicy.types import Task

_RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class TaskDifference:
    """A task whose greedy answers earned different rewards."""

    prompt: str
    before: str
    after: str
    reward_before: float
    reward_after: float

    @property
    def gain(self) -> float:
        """What the second policy earned more."""
        return self.reward_after - self.reward_before


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The mean gain over `count` tasks, between `low` and `high` with 95 % confidence.

    The interval is a paired bootstrap: each task's gain is one observation, the tasks are drawn
    again with replacement `_RESAMPLES` times, and the middle 95 % of the means are kept.
    """

    gain: float
    low: float
    high: float
    count: int
    differences: Sequence[TaskDifference]

    @property
    def better(self) -> int:
        """On how many tasks the second policy earned more."""
        return sum(difference.gain > 0 for difference in self.differences)

    @property
    def worse(self) -> int:
        """On how many tasks it earned less."""
        return len(self.differences) - self.better

    def __str__(self) -> str:
        return f"{self.gain:+.3f}, 95 % interval {self.low:+.3f} to {self.high:+.3f}"


def compare(tasks: Sequence[Task], before: Evaluation, after: Evaluation) -> Comparison:
    """The greedy answers of two evaluations on the same tasks, largest differences first.

    Tasks that either was not scored on are left out.
    """
    pairs = [
        (task, one, other, one.reward, other.reward)
        for task, one, other in zip(tasks, before.greedy, after.greedy, strict=True)
    ]
    scored = [
        TaskDifference(
            prompt=prompt_text(task.prompt),
            before=one.completion,
            after=other.completion,
            reward_before=had,
            reward_after=has,
        )
        for task, one, other, had, has in pairs
        if had is not None and has is not None
    ]
    if not scored:
        raise ConfigError("no task was scored under both policies: there is nothing to compare")
    low, high = bootstrap_interval([difference.gain for difference in scored])
    return Comparison(
        gain=float(np.mean([difference.gain for difference in scored])),
        low=low,
        high=high,
        count=len(scored),
        differences=sorted(
            (difference for difference in scored if difference.gain),
            key=lambda difference: -abs(difference.gain),
        ),
    )


def bootstrap_interval(gains: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """The middle 95 % of the means of `gains` drawn again with replacement."""
    values, counts = np.unique(np.asarray(gains, dtype=np.float64), return_counts=True)
    shares = counts / len(gains)
    # How often each distinct gain is drawn: the same means, without drawing task by task.
    drawn = np.random.default_rng(seed).multinomial(len(gains), shares, size=_RESAMPLES)
    means = drawn @ values / len(gains)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
