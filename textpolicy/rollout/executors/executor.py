"""What the loop and its rollout workers say to each other: jobs, finished jobs, new versions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from textpolicy.types import RolloutGroup, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutJob:
    """Tasks that one worker plays at the same time.

    The draws depend on `seed` and on the place of a task among all tasks of that seed. `first` is
    the place of the first task. So any split of the tasks into jobs gives the same rollouts.
    """

    number: int
    tasks: Sequence[Task]
    group_size: int
    seed: int
    first: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedJob:
    """A job that has ended, with a group for each task that was not given up, in their order.

    `given_up` holds tasks of `job.tasks` themselves. The tasks of the groups may be copies.
    `seconds` is what the worker took for the job, and `reward_seconds` the part of its rewards.
    `ended` is how often a worker died or hung while it played tasks of the job.
    """

    job: RolloutJob
    groups: Sequence[RolloutGroup]
    seconds: float = 0.0
    reward_seconds: float = 0.0
    worker: int = 0
    given_up: Sequence[Task] = ()
    ended: int = 0


@runtime_checkable
class Executor(Protocol):
    """Plays jobs on one or more workers, each of which holds a policy and a scorer."""

    @property
    def workers(self) -> int:
        """The number of workers among which the tasks of a generation are divided."""
        ...

    @property
    def in_background(self) -> bool:
        """Whether workers play the jobs while the caller trains.

        If not, `completed` plays them in this process, and waiting for a job is sampling.
        """
        ...

    def follow(self, version: int, published: Path) -> None:
        """Let every job that begins from now on sample with `version`, or with a newer one."""
        ...

    def submit(self, job: RolloutJob) -> None:
        """Put a job into the queue of jobs."""
        ...

    def completed(self, *, wait: bool) -> list[FinishedJob]:
        """Return the jobs that have ended since the last call.

        With `wait`, return at least one if any job is unfinished. The errors of rewards and
        environments that must end the run are raised here.
        """
        ...

    def restart(self, worker: int) -> None:
        """End a worker and start a new one. Its jobs are played again."""
        ...

    def close(self) -> None:
        """End all workers and drop the unfinished jobs."""
        ...
