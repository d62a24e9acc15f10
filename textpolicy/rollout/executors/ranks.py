"""The executor of ranks: each plays a part of every job, and all get the groups of all."""

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from textpolicy.activity import doing
from textpolicy.buffer import group_from_json, group_to_json
from textpolicy.errors import RunInterruptedError, TaskError, TextPolicyError
from textpolicy.ranks import Ranks
from textpolicy.rewards import Scorer
from textpolicy.rollout.executors.executor import Executor, FinishedJob, RolloutJob
from textpolicy.rollout.executors.in_process import InProcessExecutor
from textpolicy.rollout.worker import collect
from textpolicy.types import Policy, RolloutGroup, Task
from textpolicy.untrusted.parsing import parse_json


@dataclass(frozen=True, slots=True)
class _Divided:
    """A job of all ranks, and the part of it that this rank plays; None if it plays nothing."""

    whole: RolloutJob
    own: RolloutJob | None


class RankedExecutor:
    """Divides each job among the ranks; `inner` plays the part of this rank.

    All ranks must submit the same jobs. They finish a job together, in the order in which jobs were
    submitted, and an error of one rank is raised on all.
    """

    in_background = False

    def __init__(self, inner: Executor, ranks: Ranks) -> None:
        self._inner = inner
        self._ranks = ranks
        self._jobs: deque[_Divided] = deque()
        self._played: dict[int, FinishedJob] = {}

    @property
    def workers(self) -> int:
        return self._inner.workers

    def follow(self, version: int, published: Path) -> None:
        self._inner.follow(version, published)

    def submit(self, job: RolloutJob) -> None:
        """Put the own part of a job into the queue of the inner executor."""
        part = self._ranks.own_part(len(job.tasks))
        own = replace(job, tasks=job.tasks[part.start : part.stop], first=job.first + part.start)
        self._jobs.append(_Divided(job, own if part else None))
        if part:
            self._inner.submit(own)

    def completed(self, *, wait: bool) -> list[FinishedJob]:
        """Finish the next job with the other ranks; without `wait`, return nothing."""
        if not wait or not self._jobs:
            return []
        divided = self._jobs.popleft()
        try:
            own = self._play(divided.own)
        except TextPolicyError as error:
            self._ranks.gather(_failure(error))
            raise
        told = [parse_json(one, constants=True) for one in self._ranks.gather(_message(own))]
        for rank, one in enumerate(told):
            if "failure" in one:
                kind = RunInterruptedError if one["interrupted"] else TaskError
                raise kind(f"rank {rank} could not play its tasks: {one['failure']}")
        return [_joined(divided.whole, own, told, self._ranks)]

    def restart(self, worker: int) -> None:
        self._inner.restart(worker)

    def close(self) -> None:
        self._jobs.clear()
        self._inner.close()

    def _play(self, own: RolloutJob | None) -> FinishedJob | None:
        while own and own.number not in self._played:
            for finished in self._inner.completed(wait=True):
                self._played[finished.job.number] = finished
        return self._played.pop(own.number) if own else None


def collect_with_ranks(
    tasks: Sequence[Task],
    policy: Policy,
    scorer: Scorer,
    ranks: Ranks,
    *,
    group_size: int,
    seed: int,
) -> list[RolloutGroup]:
    """Return what `collect` returns: each rank plays a part of the tasks, and gets all groups."""
    if ranks.size == 1:
        return collect(tasks, policy, scorer, group_size=group_size, seed=seed)
    executor = RankedExecutor(InProcessExecutor(policy, scorer), ranks)
    executor.submit(RolloutJob(number=0, tasks=tasks, group_size=group_size, seed=seed))
    with doing("sampling with other ranks"):
        (finished,) = executor.completed(wait=True)
    return [replace(g, task=task) for g, task in zip(finished.groups, tasks, strict=True)]


def _failure(error: TextPolicyError) -> bytes:
    interrupted = isinstance(error, RunInterruptedError)
    return json.dumps({"failure": str(error), "interrupted": interrupted}).encode()


def _message(own: FinishedJob | None) -> bytes:
    """Return what other ranks need of a finished part."""
    if own is None:
        return b'{"groups": [], "given_up": []}'
    given_up = {id(task) for task in own.given_up}
    told: dict[str, Any] = {
        "groups": [group_to_json(group) for group in own.groups],
        "given_up": [place for place, task in enumerate(own.job.tasks) if id(task) in given_up],
    }
    return json.dumps(told).encode()


def _joined(
    whole: RolloutJob, own: FinishedJob | None, told: Sequence[Any], ranks: Ranks
) -> FinishedJob:
    """Return the whole job, with the times of this rank's part."""
    groups: list[RolloutGroup] = []
    given_up: list[Task] = []
    for rank, one in enumerate(told):
        own_groups = rank == ranks.rank and own
        groups += own_groups.groups if own_groups else map(group_from_json, one["groups"])
        start = ranks.part_of(rank, len(whole.tasks)).start
        given_up += [whole.tasks[start + place] for place in one["given_up"]]
    return FinishedJob(
        job=whole,
        groups=groups,
        seconds=own.seconds if own else 0.0,
        reward_seconds=own.reward_seconds if own else 0.0,
        given_up=given_up,
    )
