"""Where a run is in its tasks, so that a later one can go on from there."""

import json
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from itertools import islice
from typing import Any, Protocol, runtime_checkable

from textpolicy.errors import TaskError, TrainingError
from textpolicy.types import Curriculum, RolloutGroup, Task


@runtime_checkable
class ResumableCurriculum(Protocol):
    """A curriculum whose place can be kept: `state` is anything that JSON can hold."""

    def state(self) -> Mapping[str, Any]: ...

    def restore(self, state: Mapping[str, Any], /) -> None: ...


class TaskSource:
    """Gives out tasks and counts them. Going on means drawing as many again from a fresh source,
    which have to be the same.

    A `Curriculum` chooses by what it has seen, so it has to be `ResumableCurriculum` itself.
    """

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._source = iter(tasks)
        self._drawn = 0
        self._seen = blake2b(digest_size=16)

    def take(self, count: int) -> list[Task]:
        """The next `count` tasks."""
        batch = list(islice(self._source, count))
        self._drawn += len(batch)
        for task in batch:
            self._seen.update(_content(task))
        if len(batch) < count:
            raise TaskError(
                f"the tasks ran out: {count} more were needed after {self._drawn - len(batch)}, "
                f"and {len(batch)} came. Pass a longer list, or an iterator without end such as "
                "itertools.cycle(tasks)"
            )
        return batch

    def observe(self, groups: Sequence[RolloutGroup]) -> None:
        """Tell a curriculum how the policy did."""
        if isinstance(self._source, Curriculum):
            self._source.observe(groups)

    def state(self) -> dict[str, Any]:
        """What `restore` needs, if the source can be gone on with at all."""
        if not isinstance(self._source, Curriculum):
            return {"drawn": self._drawn, "seen": self._seen.hexdigest()}
        return {"drawn": self._drawn, "curriculum": dict(_resumable(self._source).state())}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to where `state` was taken. Without "seen" in it, other tasks will do too."""
        if isinstance(self._source, Curriculum):
            _resumable(self._source).restore(state["curriculum"])
            self._drawn = state["drawn"]
        else:
            self.take(state["drawn"])
            if state.get("seen", self._seen.hexdigest()) != self._seen.hexdigest():
                raise TaskError(
                    f"the first {self._drawn} tasks are others than the run was trained on: the "
                    "data or the environment has changed since. Put it back as it was, or begin a "
                    "new run from the adapters of this one; `textpolicy train --resume RUN "
                    "--force` goes on with the tasks as they are"
                )


def _content(task: Task) -> bytes:
    """What a rollout and its reward depend on, but for objects that have no text."""
    said = [task.prompt, task.example, task.seed]
    return json.dumps(said, default=lambda value: type(value).__name__).encode()


def _resumable(source: object) -> ResumableCurriculum:
    if not isinstance(source, ResumableCurriculum):
        raise TrainingError(
            f"the curriculum {type(source).__name__} cannot be kept in a checkpoint: give it the "
            "methods state() and restore(state), as "
            "textpolicy.rollout.task_source.ResumableCurriculum has them, or train without "
            "checkpoints"
        )
    return source
