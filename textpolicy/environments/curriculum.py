"""Which task comes next, by how the ones before went."""

from collections.abc import Iterable, Sequence
from random import Random

from textpolicy.types import RolloutGroup, Task


class MixedAgain:
    """Gives tasks again that were solved by some of their rollouts and not by all.

    Those are the tasks with something to teach. A `share` of what is given out comes from the
    latest `capacity` of them, each once for every time it was seen; the rest is new.
    """

    def __init__(
        self, tasks: Iterable[Task], *, share: float = 0.5, capacity: int = 256, seed: int = 0
    ) -> None:
        self._tasks = iter(tasks)
        self._share = share
        self._capacity = capacity
        self._random = Random(seed)
        self._again: list[Task] = []

    def __iter__(self) -> "MixedAgain":
        return self

    def __next__(self) -> Task:
        if self._again and self._random.random() < self._share:
            return self._again.pop(self._random.randrange(len(self._again)))
        return next(self._tasks)

    def observe(self, groups: Sequence[RolloutGroup]) -> None:
        """Keep the tasks of groups whose rewards differ."""
        for group in groups:
            rewards = {r.reward for r in group.rollouts if r.reward is not None}
            if len(rewards) > 1:
                self._again.append(group.task)
        del self._again[: -self._capacity]
