"""Groups in, fresh groups out."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from textpolicy.types import Rollout, RolloutGroup, Sampling, StopReason, Task, Turn


class Buffer:
    """Holds rollout groups between sampling and training, and knows how stale each one is.

    A group's staleness is how many adapter versions the trainer has made since its oldest member
    was sampled. `take` drops what is staler than `max_staleness` and counts it in `dropped`.
    """

    def __init__(self, max_staleness: int = 0) -> None:
        self.max_staleness = max_staleness
        self.dropped = 0
        self._groups: list[RolloutGroup] = []

    def __len__(self) -> int:
        return len(self._groups)

    def extend(self, groups: Iterable[RolloutGroup]) -> None:
        """Add groups, oldest first."""
        self._groups.extend(groups)

    def take(self, version: int, limit: int | None = None) -> list[RolloutGroup]:
        """Remove and return up to `limit` groups that are fresh enough for `version`."""
        fresh = [g for g in self._groups if version - g.version <= self.max_staleness]
        self.dropped += len(self._groups) - len(fresh)
        limit = len(fresh) if limit is None else limit
        self._groups = fresh[limit:]
        return fresh[:limit]

    def state(self) -> dict[str, Any]:
        """What `restore` needs, in values that JSON can hold."""
        return {
            "dropped": self.dropped,
            "groups": [_group_to_json(group) for group in self._groups],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Hold what was held when `state` was taken, and nothing else."""
        self.dropped = state["dropped"]
        self._groups = [_group(facts) for facts in state["groups"]]


def _group_to_json(group: RolloutGroup) -> dict[str, Any]:
    """All of a group that training needs, in values that JSON can hold.

    Of the task that is its id and prompt: it has been scored, with columns that may be anything.
    """
    return {
        "task": group.task.id,
        "prompt": group.task.prompt,
        "rollouts": [asdict(rollout) for rollout in group.rollouts],
    }


def _group(facts: Mapping[str, Any]) -> RolloutGroup:
    task = Task(id=facts["task"], prompt=facts["prompt"])
    return RolloutGroup(task=task, rollouts=[_rollout(one) for one in facts["rollouts"]])


def _rollout(facts: Mapping[str, Any]) -> Rollout:
    sampling = facts["sampling"]
    special: dict[str, Any] = {
        "sampling": Sampling(**(sampling | {"stop": tuple(sampling["stop"])})),
        "stop_reason": StopReason(facts["stop_reason"]),
        "turns": [Turn(**turn) for turn in facts["turns"]],
    }
    return Rollout(**(dict(facts) | special))
