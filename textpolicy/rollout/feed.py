"""RolloutFeed: takes tasks from the source, gets their groups from workers, and fills the buffer.

The groups that are sampled together are a generation. A generation is divided into one job for each
worker. At any time, all groups that are sampled, wait or are buffered are at most those of
`max_staleness + 1` steps. So workers run ahead of the trainer by a bounded number of versions.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

from textpolicy.activity import doing
from textpolicy.buffer import Buffer, group_from_json, group_to_json
from textpolicy.config import staleness_bound
from textpolicy.errors import ConfigError, TrainingError
from textpolicy.rollout.dynamic_sampling import GroupGeneration
from textpolicy.rollout.executors.executor import Executor, FinishedJob, RolloutJob
from textpolicy.rollout.task_source import TaskSource
from textpolicy.rollout.worker_load import WorkerLoad
from textpolicy.tracking.rollout_metrics import rollout_metrics
from textpolicy.types import NOT_SAMPLED, Metrics, RolloutGroup, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedOptions:
    """How many groups a run samples, and how far its workers may run ahead of the trainer."""

    steps: int
    groups_per_step: int
    group_size: int
    steps_per_generation: int = 1
    refill_rounds: int = 1
    max_staleness: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.staleness  # Raises if the bound is too small.

    @property
    def staleness(self) -> int:
        """The bound on the staleness of groups, in versions."""
        return staleness_bound(self.max_staleness, self.steps_per_generation)

    @property
    def generation(self) -> int:
        """The number of groups of a generation."""
        return self.groups_per_step * self.steps_per_generation

    @property
    def is_synchronous(self) -> bool:
        """Whether each generation is trained on before the next one begins."""
        return self.staleness == self.steps_per_generation - 1


@dataclass(kw_only=True)
class Arrivals:
    """What came from the workers in one step: finished jobs, and generations that are complete."""

    workers: int
    jobs: list[FinishedJob] = field(default_factory=list[FinishedJob])
    generations: list[GroupGeneration] = field(default_factory=list[GroupGeneration])

    @property
    def groups(self) -> list[RolloutGroup]:
        """All groups of the complete generations."""
        return [group for one in self.generations for group in one.sampled]

    @property
    def reward_seconds(self) -> float:
        return sum(job.reward_seconds for job in self.jobs)

    @property
    def metrics(self) -> Metrics:
        """The metrics of the groups and of their sampling; none if no generation is complete."""
        if not self.groups:
            return {}
        metrics = rollout_metrics(self.groups) | {
            "refill/rounds": float(max(one.rounds for one in self.generations)),
            "refill/dropped": float(sum(one.dropped for one in self.generations)),
        }
        if seconds := sum(one.seconds for one in self.generations) / self.workers:
            metrics["tokens_per_second"] = metrics["num_tokens"] / seconds
        return metrics


@dataclass(kw_only=True)
class _Round:
    """The round of a generation that is being sampled."""

    generation: GroupGeneration
    first: int
    """The position of the first task among all tasks of the run."""
    tasks: list[Task]
    version: int
    """The trainer's version when the round was submitted. No job samples with an older one."""
    unfinished: list[RolloutJob] = field(default_factory=list[RolloutJob])
    finished: list[FinishedJob] = field(default_factory=list[FinishedJob])

    def add(self, job: FinishedJob) -> None:
        """Record that a job has finished."""
        self.unfinished.remove(job.job)
        self.finished.append(job)

    @property
    def groups(self) -> list[RolloutGroup]:
        """The groups in the order of the tasks."""
        jobs = sorted(self.finished, key=lambda job: job.job.first)
        return [group for job in jobs for group in _with_own_tasks(job)]

    @property
    def seconds(self) -> float:
        """The time that workers have sampled, without the time for rewards."""
        return sum(job.seconds - job.reward_seconds for job in self.finished)


class RolloutFeed:
    """Keeps workers busy and the buffer full, and knows what a checkpoint needs of both."""

    def __init__(
        self, source: TaskSource, executor: Executor, buffer: Buffer, options: FeedOptions
    ) -> None:
        if source.is_curriculum and not options.is_synchronous:
            raise ConfigError(
                f"max_staleness is {options.staleness}, and the tasks come from a curriculum, "
                "which chooses each task by the results of earlier tasks. With workers that run "
                "ahead, a resumed run could not ask for the tasks in flight again. Set "
                f"max_staleness to {options.steps_per_generation - 1}, or train on a plain stream "
                "of tasks"
            )
        self._source = source
        self._executor = executor
        self._buffer = buffer
        self._options = options
        self._rounds: list[_Round] = []
        self._jobs = 0
        self._last_step = -1
        self._version = 0
        self._dropped = 0
        self._load = WorkerLoad(executor.workers)

    @property
    def in_background(self) -> bool:
        """Whether workers sample while the trainer trains."""
        return self._executor.in_background

    def fill(self, step: int, version: int) -> Arrivals:
        """Wait until the buffer has the groups of a step, and return what has arrived.

        The buffer has fewer groups if nothing more is being sampled, but at least one. Groups that
        are too stale for the trainer's `version` are dropped.
        """
        arrivals, self._version = Arrivals(workers=self._executor.workers), version
        self._receive(arrivals, wait=False)
        self._begin_generations(step)
        while not self._buffer or (self._rounds and self._lacks_groups):
            self._begin_generations(step)
            self._receive(arrivals, wait=True)
        return arrivals

    def follow(self, version: int, published: Path) -> None:
        """Let the jobs that begin from now on sample with this version."""
        self._version = version
        self._executor.follow(version, published)

    def metrics(self) -> Metrics:
        """Return the metrics of workers since the last call; none if this process samples."""
        if not self.in_background:
            return {}
        dropped, self._dropped = self._buffer.dropped - self._dropped, self._buffer.dropped
        queued = sum(len(job.tasks) for one in self._rounds for job in one.unfinished)
        return self._load.metrics() | {
            "workers/queued": float(queued),
            "buffer/dropped": float(dropped),
        }

    def state(self) -> dict[str, Any]:
        """Return the tasks, the buffer and the generations in flight, as values for JSON.

        A round that is being sampled is there as the positions of its tasks.
        """
        rounds = [
            {
                "step": one.generation.step,
                "wanted": one.generation.wanted,
                "rounds": one.generation.rounds,
                "sampled": [group_to_json(group) for group in one.generation.sampled],
                "first": one.first,
                "count": len(one.tasks),
            }
            for one in self._rounds
        ]
        return {
            "tasks": self._source.state(),
            "buffer": self._buffer.state(),
            "feed": {"last_step": self._last_step, "rounds": rounds},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state()`: rounds that were being sampled are sampled again."""
        earlier = self._source.restore(state["tasks"])
        self._buffer.restore(state["buffer"])
        self._dropped = self._buffer.dropped
        # Earlier releases sampled every generation within a step.
        feed = state.get("feed", {"last_step": -1, "rounds": []})
        self._last_step = feed["last_step"]
        for one in sorted(feed["rounds"], key=itemgetter("step")):
            generation = GroupGeneration(
                step=one["step"],
                wanted=one["wanted"],
                most_rounds=self._options.refill_rounds,
                rounds=one["rounds"],
                sampled=[group_from_json(group) for group in one["sampled"]],
            )
            first, end = one["first"], one["first"] + one["count"]
            self._submit(generation, first, earlier[first:end])

    @property
    def _lacks_groups(self) -> bool:
        return len(self._buffer) < self._options.groups_per_step

    @property
    def _waiting(self) -> int:
        """The groups that are in flight or in the buffer."""
        return len(self._buffer) + sum(one.generation.wanted for one in self._rounds)

    def _begin_generations(self, step: int) -> None:
        """Begin as many generations as the bound on staleness allows, but none for later runs."""
        options = self._options
        most = (options.staleness + 1) * options.groups_per_step
        needed = (options.steps - step) * options.groups_per_step
        while self._waiting < needed and self._waiting + options.generation <= most:
            # A synchronous run begins a generation in the step that has nothing to train on.
            next_step = self._last_step + options.steps_per_generation
            begins_now = step > self._last_step and not self._waiting
            self._last_step = step if begins_now else next_step
            self._begin_round(
                GroupGeneration(
                    step=self._last_step,
                    wanted=options.generation,
                    most_rounds=options.refill_rounds,
                )
            )

    def _begin_round(self, generation: GroupGeneration) -> None:
        first = self._source.drawn
        self._submit(generation, first, self._source.next_tasks(generation.missing))

    def _submit(self, generation: GroupGeneration, first: int, tasks: list[Task]) -> None:
        """Divide the tasks of a round into one job for each worker."""
        new = _Round(generation=generation, first=first, tasks=tasks, version=self._version)
        self._rounds.append(new)
        count = min(self._executor.workers, len(tasks))
        ends = [len(tasks) * number // count for number in range(count + 1)]
        for begin, end in pairwise(ends):
            job = RolloutJob(
                number=self._jobs,
                tasks=tasks[begin:end],
                group_size=self._options.group_size,
                seed=(self._options.seed << 32) + (generation.rounds << 24) + generation.step,
                first=begin,
            )
            self._jobs += 1
            new.unfinished.append(job)
            self._executor.submit(job)

    def _receive(self, arrivals: Arrivals, *, wait: bool) -> None:
        """Take the finished jobs, and put the generations that they complete into the buffer."""
        with self._noting_the_wait() if wait else nullcontext():
            finished = self._executor.completed(wait=wait)
        if wait and not finished:
            raise TrainingError(
                f"{sum(len(one.unfinished) for one in self._rounds)} jobs have not ended, but "
                f"completed(wait=True) of {type(self._executor).__name__} returned none. An "
                "executor must return each job that was submitted, also one whose tasks are all "
                "given up"
            )
        for job in finished:
            self._load.add(job)
            arrivals.jobs.append(job)
            (its_round,) = [one for one in self._rounds if job.job in one.unfinished]
            its_round.add(job)
            if not its_round.unfinished:
                self._finish_round(its_round, arrivals)
        self._buffer.drop_stale(self._version)

    def _finish_round(self, done: _Round, arrivals: Arrivals) -> None:
        self._rounds.remove(done)
        generation, groups = done.generation, done.groups
        _check_versions(groups, done.version)
        generation.add_round(groups, done.seconds)
        if generation.missing:
            self._begin_round(generation)
        else:
            self._buffer.extend(generation.kept)
            self._source.observe(generation.sampled)
            arrivals.generations.append(generation)

    def _noting_the_wait(self) -> AbstractContextManager[object]:
        """Mark the wait for workers, so that the watchdog can say what a step waits for."""
        if not self.in_background:
            return nullcontext()
        return doing("waiting for groups of the workers")


def _check_versions(groups: Sequence[RolloutGroup], version: int) -> None:
    """Raise `TrainingError` if a group was sampled with a version older than `version`.

    Its workers do not follow the trainer, so that all further groups would be too stale.
    """
    for group in groups:
        if NOT_SAMPLED < group.version < version:
            raise TrainingError(
                f"task {group.task.id!r} was sampled with adapter version {group.version}, "
                f"although the trainer had version {version} when the task was submitted. Let the "
                "policy load the adapters that the trainer begins with, and let follow() of the "
                "executor load each version that it is told"
            )


def _with_own_tasks(job: FinishedJob) -> list[RolloutGroup]:
    """Return the groups with the tasks that were submitted: a worker may have sent copies."""
    given_up = {id(task) for task in job.given_up}
    tasks = [task for task in job.job.tasks if id(task) not in given_up]
    return [replace(group, task=task) for group, task in zip(job.groups, tasks, strict=True)]
