"""The buffer between sampling and training: groups go in, groups that are fresh enough come out."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from textpolicy.errors import TrainingError
from textpolicy.types import Rollout, RolloutGroup, Sampling, Segment, StopReason, Task, Turn


class Buffer:
    """Holds rollout groups until they are trained on; `dropped` counts the groups it drops.

    The staleness of a group is the number of adapter versions that the trainer has made since the
    group's oldest rollout was sampled. `take` drops groups that are staler than `max_staleness`.
    """

    def __init__(self, max_staleness: int = 0) -> None:
        self.max_staleness = max_staleness
        self.dropped = 0
        self._groups: list[RolloutGroup] = []

    def __len__(self) -> int:
        return len(self._groups)

    def extend(self, groups: Iterable[RolloutGroup]) -> None:
        """Add groups in the order in which they were sampled."""
        self._groups.extend(groups)

    def take(self, version: int, limit: int | None = None) -> list[RolloutGroup]:
        """Remove and return up to `limit` groups that are fresh enough for `version`."""
        self.drop_stale(version)
        limit = len(self._groups) if limit is None else limit
        taken, self._groups = self._groups[:limit], self._groups[limit:]
        return taken

    def drop_stale(self, version: int) -> None:
        """Remove the groups that are too stale for `version`, and count them.

        Raise `TrainingError` if a group was sampled with a version that is newer than `version`.
        """
        for group in self._groups:
            newest = max(rollout.version for rollout in group.rollouts)
            if newest > version:
                raise TrainingError(
                    f"a rollout of task {group.task.id!r} was sampled with adapter version "
                    f"{newest}, and the trainer has made no version above {version}. The worker "
                    "follows the adapters of another run. Give each run its own folder, or start "
                    "the workers again"
                )
        fresh = [g for g in self._groups if version - g.version <= self.max_staleness]
        self.dropped += len(self._groups) - len(fresh)
        self._groups = fresh

    def state(self) -> dict[str, Any]:
        """Return the content for a checkpoint, in values that JSON can hold."""
        groups = [group_to_json(group) for group in self._groups]
        return {"dropped": self.dropped, "groups": groups}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Replace the content by the content in `state`."""
        self.dropped = state["dropped"]
        self._groups = [group_from_json(group) for group in state["groups"]]


def group_to_json(group: RolloutGroup) -> dict[str, Any]:
    """Return all that training needs: the task's other columns served the rewards only."""
    return {
        "task": group.task.id,
        "prompt": group.task.prompt,
        "rollouts": [rollout_to_json(rollout) for rollout in group.rollouts],
    }


def rollout_to_json(rollout: Rollout) -> dict[str, Any]:
    """Return the fields of a rollout, in values that JSON can hold.

    Earlier releases read rollouts without `later` and `versions`, so they are there only if given.
    """
    fields = asdict(rollout)
    fields["later"] = [_without_empty(segment, "versions") for segment in fields["later"]]
    return _without_empty(fields, "later", "versions")


def _without_empty(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value or name not in names}


def group_from_json(content: Mapping[str, Any]) -> RolloutGroup:
    task = Task(id=content["task"], prompt=content["prompt"])
    rollouts = [rollout_from_json(rollout) for rollout in content["rollouts"]]
    return RolloutGroup(task=task, rollouts=rollouts)


def rollout_from_json(content: Mapping[str, Any]) -> Rollout:
    """Return the rollout of which `rollout_to_json` returned the content."""
    sampling = content["sampling"]
    special: dict[str, Any] = {
        "sampling": Sampling(**(sampling | {"stop": tuple(sampling["stop"])})),
        "stop_reason": StopReason(content["stop_reason"]),
        "turns": [Turn(**turn) for turn in content["turns"]],
        "later": tuple(Segment(**segment) for segment in content.get("later", ())),
    }
    return Rollout(**(dict(content) | special))
