"""A curriculum: which task comes next depends on the rewards of earlier groups."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from random import Random
from typing import Any

from textpolicy.types import RolloutGroup, Task

_NumberedTask = tuple[int, Task]


class MixedTaskCurriculum:
    """Repeats the tasks whose group had different rewards, because these groups have a gradient.

    The next task is a repeated task with probability `share` if there is one, and a new task
    otherwise. The latest `capacity` tasks are kept, and each is repeated once for every time that
    its group had different rewards.
    """

    def __init__(
        self, tasks: Iterable[Task], *, share: float = 0.5, capacity: int = 256, seed: int = 0
    ) -> None:
        self._new_tasks = enumerate(tasks)
        self._share = share
        self._capacity = capacity
        self._random = Random(seed)
        self._new_count = 0
        self._in_progress: list[_NumberedTask] = []
        self._to_repeat: list[_NumberedTask] = []

    def __iter__(self) -> "MixedTaskCurriculum":
        return self

    def __next__(self) -> Task:
        if self._to_repeat and self._random.random() < self._share:
            chosen = self._to_repeat.pop(self._random.randrange(len(self._to_repeat)))
        else:
            chosen = next(self._new_tasks)
            self._new_count += 1
        self._in_progress.append(chosen)
        return chosen[1]

    def observe(self, groups: Sequence[RolloutGroup]) -> None:
        """Keep the tasks of the groups whose rewards differ."""
        for group in groups:
            rewards = {r.reward for r in group.rollouts if r.reward is not None}
            place = next(i for i, (_, task) in enumerate(self._in_progress) if task is group.task)
            numbered = self._in_progress.pop(place)
            if len(rewards) > 1:
                self._to_repeat.append(numbered)
        del self._to_repeat[: -self._capacity]

    def state(self) -> Mapping[str, Any]:
        """Return the state for a checkpoint, in values that JSON can hold."""
        again = [number for number, _ in self._to_repeat]
        return {"drawn": self._new_count, "again": again, "random": self._random.getstate()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned. Call `restore` before the first task is drawn."""
        self._new_count = state["drawn"]
        earlier = dict(islice(self._new_tasks, self._new_count))
        self._to_repeat = [(number, earlier[number]) for number in state["again"]]
        version, words, gauss = state["random"]
        self._random.setstate((version, tuple(words), gauss))
