"""The tasks of a run, and the position among them that a checkpoint records."""

import json
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from itertools import islice
from typing import Any, Protocol, runtime_checkable

from textpolicy.errors import TaskError, TrainingError
from textpolicy.types import Curriculum, RolloutGroup, Task


@runtime_checkable
class ResumableCurriculum(Protocol):
    """A curriculum that a checkpoint can hold: `state` returns values that JSON can hold."""

    def state(self) -> Mapping[str, Any]: ...

    def restore(self, state: Mapping[str, Any], /) -> None: ...


class TaskSource:
    """Gives out the tasks of a run in order, and counts them.

    To resume, a new source skips as many tasks as were given out, and checks that they are the
    same tasks. A `Curriculum` chooses tasks by earlier results, so it must be a
    `ResumableCurriculum` if the run has checkpoints.
    """

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._tasks = iter(tasks)
        self._drawn = 0
        self._digest = blake2b(digest_size=16)

    @property
    def drawn(self) -> int:
        """How many tasks were given out."""
        return self._drawn

    @property
    def is_curriculum(self) -> bool:
        """Whether the tasks depend on the results of earlier tasks."""
        return isinstance(self._tasks, Curriculum)

    def next_tasks(self, count: int) -> list[Task]:
        """Return the next `count` tasks. Raise `TaskError` if there are fewer."""
        tasks = list(islice(self._tasks, count))
        self._drawn += len(tasks)
        for task in tasks:
            # What a rollout and its reward depend on; an object without a text gives its type.
            content = [task.prompt, task.example, task.seed]
            content += [list(task.preamble)] if task.preamble else []
            text = json.dumps(content, default=lambda value: type(value).__name__)
            self._digest.update(text.encode())
        if len(tasks) < count:
            raise TaskError(
                f"the tasks ran out: {count} more were needed after {self._drawn - len(tasks)}, "
                f"but only {len(tasks)} were left. Pass a longer list, or an iterator without end "
                "such as itertools.cycle(tasks)"
            )
        return tasks

    def observe(self, groups: Sequence[RolloutGroup]) -> None:
        """Give a curriculum the rollouts of its tasks."""
        if isinstance(self._tasks, Curriculum):
            self._tasks.observe(groups)

    def state(self) -> dict[str, Any]:
        """Return the position for a checkpoint, in values that JSON can hold."""
        if not isinstance(self._tasks, Curriculum):
            return {"drawn": self._drawn, "seen": self._digest.hexdigest()}
        return {"drawn": self._drawn, "curriculum": dict(_require_resumable(self._tasks).state())}

    def restore(self, state: Mapping[str, Any]) -> list[Task]:
        """Go to the position in `state`, and return the tasks before it; none of a curriculum.

        If `state` has no "seen", any tasks are accepted.
        """
        if isinstance(self._tasks, Curriculum):
            _require_resumable(self._tasks).restore(state["curriculum"])
            self._drawn = state["drawn"]
            return []
        tasks = self.next_tasks(state["drawn"])
        if state.get("seen", self._digest.hexdigest()) != self._digest.hexdigest():
            raise TaskError(
                f"the first {self._drawn} tasks are not the tasks that this run was trained on, so "
                "the data or the environment has changed since the checkpoint. Restore the data, "
                "or start a new run from this run's adapters, or resume with the new tasks: "
                "`textpolicy train --resume RUN --force`"
            )
        return tasks


def _require_resumable(curriculum: object) -> ResumableCurriculum:
    if not isinstance(curriculum, ResumableCurriculum):
        raise TrainingError(
            f"the curriculum {type(curriculum).__name__} cannot be saved in a checkpoint, because "
            "it lacks the methods state() and restore(state) of "
            "textpolicy.rollout.task_source.ResumableCurriculum; add both methods, or train "
            "without checkpoints"
        )
    return curriculum
