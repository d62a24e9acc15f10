"""Which task comes next, by how the ones before went."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from random import Random
from typing import Any

from textpolicy.types import RolloutGroup, Task

_NumberedTask = tuple[int, Task]


class MixedTaskCurriculum:
    """Gives tasks again that were solved by some of their rollouts and not by all.

    Those are the tasks with something to teach. A `share` of what is given out comes from the
    latest `capacity` of them, each once for every time it was seen; the rest is new.
    """

    def __init__(
        self, tasks: Iterable[Task], *, share: float = 0.5, capacity: int = 256, seed: int = 0
    ) -> None:
        self._tasks = enumerate(tasks)
        self._share = share
        self._capacity = capacity
        self._random = Random(seed)
        self._drawn = 0
        self._given: list[_NumberedTask] = []
        self._again: list[_NumberedTask] = []

    def __iter__(self) -> "MixedTaskCurriculum":
        return self

    def __next__(self) -> Task:
        if self._again and self._random.random() < self._share:
            chosen = self._again.pop(self._random.randrange(len(self._again)))
        else:
            chosen = next(self._tasks)
            self._drawn += 1
        self._given.append(chosen)
        return chosen[1]

    def observe(self, groups: Sequence[RolloutGroup]) -> None:
        """Keep the tasks of groups whose rewards differ."""
        for group in groups:
            rewards = {r.reward for r in group.rollouts if r.reward is not None}
            place = next(i for i, (_, task) in enumerate(self._given) if task is group.task)
            given = self._given.pop(place)
            if len(rewards) > 1:
                self._again.append(given)
        del self._again[: -self._capacity]

    def state(self) -> Mapping[str, Any]:
        """What `restore` needs, in values that JSON can hold."""
        again = [number for number, _ in self._again]
        return {"drawn": self._drawn, "again": again, "random": self._random.getstate()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to where `state` was taken; to be called before any task is given out."""
        self._drawn = state["drawn"]
        drawn = dict(islice(self._tasks, self._drawn))
        self._again = [(number, drawn[number]) for number in state["again"]]
        version, words, gauss = state["random"]
        self._random.setstate((version, tuple(words), gauss))
