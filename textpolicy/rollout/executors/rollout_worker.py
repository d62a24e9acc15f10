"""`RolloutWorker`: plays jobs in a process of its own, with its own policy, rewards and tasks."""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from textpolicy.errors import AdapterError, UnreadableError
from textpolicy.rewards import Rewards, Scorer, as_rewards
from textpolicy.rollout.executors.worker_link import (
    PlayedJob,
    PublishedVersion,
    SentJob,
    receive_tasks,
)
from textpolicy.rollout.worker import collect
from textpolicy.types import Policy, SwappingPolicy, Task


def as_it_is(task: Task) -> Task:
    """Return the task, which needs neither an environment nor an agent."""
    return task


class RolloutWorker:
    """Holds a policy, its rewards, and `attach`, which gives a task its environment or agent."""

    def __init__(
        self,
        policy: Policy,
        reward: Callable[..., Any] | Rewards,
        *,
        attach: Callable[[Task], Task] = as_it_is,
    ) -> None:
        self.policy = policy
        self._attach = attach
        self._notes: list[str] = []
        self._scorer = Scorer(
            as_rewards(reward), on_incident=lambda incident: self._notes.append(str(incident))
        )

    def follow(self, published: PublishedVersion) -> int:
        """Load a version. Raise `AdapterError` if the file does not hold what was published."""
        found = sha256_of(published.path)
        if found != published.sha256:
            raise AdapterError(
                f"{published.path} holds other bytes than adapter version {published.version} had "
                f"when it was published: its SHA-256 is {found}; expected {published.sha256}. "
                "Find out which program writes in this folder, and resume the run"
            )
        version = self.policy.reload(published.path)
        if version != published.version:
            raise AdapterError(
                f"{published.path} holds adapter version {version}; expected version "
                f"{published.version}. Find out which program writes in this folder, and resume "
                "the run"
            )
        return version

    def play(self, sent: SentJob, *, load_newer: Callable[[], bool] | None = None) -> PlayedJob:
        """Return the scored rollouts of a job.

        A policy that takes new adapters between tokens calls `load_newer` before each of them.
        """
        if isinstance(self.policy, SwappingPolicy):
            self.policy.load_newer = load_newer
        started, scored = time.perf_counter(), self._scorer.seconds
        job, tasks = sent.job, receive_tasks(sent, self._attach)
        groups = collect(
            tasks,
            self.policy,
            self._scorer,
            group_size=job.group_size,
            seed=job.seed,
            first=job.first,
        )
        notes, self._notes[:] = list(self._notes), []
        return PlayedJob(
            number=sent.number,
            rollouts=[group.rollouts for group in groups],
            seconds=time.perf_counter() - started,
            reward_seconds=self._scorer.seconds - scored,
            notes=notes,
        )

    def close(self) -> None:
        """End the processes of the rewards."""
        self._scorer.close()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror}") from error
