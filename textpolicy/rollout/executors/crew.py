"""`Crew`: an executor of several workers that die, hang and start again, and lose no job.

A job whose worker ended is played again, its tasks one by one. A task whose worker ended twice is
given up: it is written to a file and never played again in this run. What a worker says after it
was ended is not read, so no rollout comes twice.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, groupby
from pathlib import Path

from textpolicy.activity import Activity, doing
from textpolicy.errors import ConfigError, RunInterruptedError, TrainingError
from textpolicy.file_writing import make_private_folder
from textpolicy.rollout.executors.executor import FinishedJob, RolloutJob
from textpolicy.rollout.executors.followed_versions import FollowedVersions
from textpolicy.rollout.executors.quarantine import Quarantine
from textpolicy.rollout.executors.worker_link import (
    Failed,
    PlayedJob,
    Ready,
    Reloaded,
    Transport,
    WorkerAnswer,
    WorkerEndedError,
    WorkerLink,
    send_job,
)
from textpolicy.runs.directory import GIVEN_UP
from textpolicy.types import Rollout, RolloutGroup

_TRIES = 2
_ENDS_IN_A_ROW = 3
_GIVEN_UP_IN_A_ROW = 8
"""So many tasks beside each other may each end their workers; more are the workers' own fault."""
_STARTUP_SECONDS = 900.0
"""How long a worker may take to load its model."""
_FIRST_SECONDS = 3600.0
"""How long a job may take before the time of other jobs is known."""
_FACTOR, _LEAST_SECONDS = 10, 60.0
_POLL_SECONDS = 1.0


class WorkersLostError(RunInterruptedError):
    """A worker has ended again and again without finishing anything."""


@dataclass(eq=False)
class _Whole:
    """A job, and what has come of its tasks so far, by their places in it."""

    job: RolloutJob
    rollouts: dict[int, Sequence[Rollout]] = field(default_factory=dict[int, Sequence[Rollout]])
    given_up: set[int] = field(default_factory=set[int])
    worker: int = 0
    seconds: float = 0.0
    reward_seconds: float = 0.0
    ended: int = 0

    @property
    def is_finished(self) -> bool:
        return len(self.rollouts) + len(self.given_up) == len(self.job.tasks)

    def result(self) -> FinishedJob:
        tasks = self.job.tasks
        return FinishedJob(
            job=self.job,
            groups=[
                RolloutGroup(task=tasks[place], rollouts=rollouts)
                for place, rollouts in sorted(self.rollouts.items())
            ],
            worker=self.worker,
            seconds=self.seconds,
            reward_seconds=self.reward_seconds,
            given_up=[tasks[place] for place in sorted(self.given_up)],
            ended=self.ended,
        )


@dataclass(eq=False)
class _Part:
    """Neighbouring tasks of a job, and how many workers have ended while they played them."""

    whole: _Whole
    places: range
    ended: int = 0

    @property
    def job(self) -> RolloutJob:
        job, first = self.whole.job, self.places.start
        return replace(job, tasks=job.tasks[first : self.places.stop], first=job.first + first)

    def __str__(self) -> str:
        number, tasks = len(self.places), self.whole.job.tasks
        return f"task {tasks[self.places.start].id}" if number == 1 else f"a job of {number} tasks"


@dataclass(eq=False)
class _Worker:
    """A worker and the parts that it was sent by the numbers of their tries, in order.

    `since` is when it was started, or when it began the first of these parts. `ends` counts how
    often it has ended since it finished something, and `given_up` the tasks that were given up for
    it since then. An end with a task that is given up is the task's fault, and is not in `ends`.
    """

    number: int
    link: WorkerLink
    since: float
    ready: bool = False
    following: int = -1
    sent: dict[int, _Part] = field(default_factory=dict[int, _Part])
    ends: int = 0
    given_up: int = 0


class Crew:
    """Plays jobs with `workers` workers of a transport. Its files are in `folder`.

    A worker that takes longer than `deadline` seconds for a job is ended; by default, longer than
    ten times the median of the jobs, and a minute at least. `note` gets lines for people. If a
    worker ends three times without finishing anything, and not by tasks that are given up, or if
    eight tasks in a row are given up for it, `completed` raises `WorkersLostError`.
    """

    def __init__(
        self,
        transport: Transport,
        workers: int,
        folder: Path,
        *,
        deadline: float | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        if workers < 1:
            raise ConfigError(f"workers is {workers}; expected at least 1 worker")
        self._transport = transport
        self._deadline = deadline
        self._note = note
        make_private_folder(folder)
        self.quarantine = Quarantine(folder / GIVEN_UP)
        self._versions = FollowedVersions(folder)
        self.ended = 0
        """How often a worker has ended before it should."""
        self._numbers = count(1)
        self._waiting: deque[_Part] = deque()
        self._unfinished: list[_Whole] = []
        self._done: list[FinishedJob] = []
        self._seconds: deque[float] = deque(maxlen=64)
        self._workers = [self._start(number) for number in range(1, workers + 1)]

    @property
    def workers(self) -> int:
        return len(self._workers)

    @property
    def in_background(self) -> bool:
        return True

    def follow(self, version: int, published: Path) -> None:
        """See `Executor`. The file may be replaced afterwards."""
        newest = self._versions.add(version, published)
        for worker in self._workers:
            worker.link.follow(newest)

    def submit(self, job: RolloutJob) -> None:
        """See `Executor`. Tasks that were given up before are given up at once."""
        if self._versions.newest is None:
            raise TrainingError(
                "a job is submitted to rollout workers that know no adapter version. Call follow "
                "first"
            )
        whole = _Whole(job)
        whole.given_up = {n for n, task in enumerate(job.tasks) if task in self.quarantine}
        self._unfinished.append(whole)
        self._waiting += _parts_without(whole.given_up, whole)
        self._finish(whole)
        # The trainer may be busy for long before it asks again.
        self._send_parts()

    def completed(self, *, wait: bool) -> list[FinishedJob]:
        """See `Executor`."""
        missing = sum(len(whole.job.tasks) for whole in self._unfinished)
        with doing(f"sampling in {_count(self.workers)}", missing) as activity:
            while True:
                for worker in list(self._workers):
                    self._look_at(worker, activity)
                self._send_parts()
                if self._done or not self._unfinished or not wait:
                    break
                self._transport.wait([one.link for one in self._workers], _POLL_SECONDS)
        done, self._done = self._done, []
        return done

    def restart(self, worker: int) -> None:
        """See `Executor`. No task is blamed for it."""
        one = self._workers[worker - 1]
        one.link.end()
        self._waiting.extendleft(reversed(one.sent.values()))
        self._workers[worker - 1] = self._start(worker)

    def close(self) -> None:
        """See `Executor`."""
        for worker in self._workers:
            worker.link.end()
        self._transport.close()
        self._versions.drop_before(None)

    # What workers say

    def _look_at(self, worker: _Worker, activity: Activity) -> None:
        try:
            for answer in worker.link.answers():
                self._take(worker, answer, activity)
        except WorkerEndedError as error:
            self._replace(worker, str(error))
            return
        limit = self._limit(worker)
        if (worker.sent or not worker.ready) and time.monotonic() - worker.since > limit:
            what = "its job" if worker.ready else "its start"
            self._replace(worker, f"took longer than {limit:.3g} s for {what} and was ended")

    def _limit(self, worker: _Worker) -> float:
        if not worker.ready:
            return _STARTUP_SECONDS
        if self._deadline is not None:
            return self._deadline
        if not self._seconds:
            return _FIRST_SECONDS
        return max(_LEAST_SECONDS, _FACTOR * statistics.median(self._seconds))

    def _take(self, worker: _Worker, answer: WorkerAnswer, activity: Activity) -> None:
        match answer:
            case Ready():
                worker.ready = True
            case Reloaded(version):
                worker.following = version
                self._versions.drop_before(min(one.following for one in self._workers))
            case Failed(error):
                raise error
            case PlayedJob():
                self._take_rollouts(worker, answer)
                activity.advance(len(answer.rollouts))

    def _take_rollouts(self, worker: _Worker, played: PlayedJob) -> None:
        number, part = next(iter(worker.sent.items()), (0, None))
        if part is None or played.number != number:
            raise WorkerEndedError(f"answered job {played.number}, which it was not sent")
        self._check(part.job, played)
        del worker.sent[number]
        worker.since = time.monotonic()
        worker.ends = worker.given_up = 0
        if not part.ended:
            self._seconds.append(played.seconds)
        for text in played.notes:
            self._note(text)
        whole = part.whole
        whole.rollouts |= zip(part.places, played.rollouts, strict=True)
        whole.worker = worker.number
        whole.seconds += played.seconds
        whole.reward_seconds += played.reward_seconds
        self._finish(whole)

    def _check(self, job: RolloutJob, played: PlayedJob) -> None:
        newest = self._versions.newest
        sizes = [len(group) for group in played.rollouts]
        if sizes != [job.group_size] * len(job.tasks):
            raise WorkerEndedError(
                f"sent groups of {sizes} rollouts; expected {len(job.tasks)} groups of "
                f"{job.group_size}"
            )
        rollouts = [rollout for group in played.rollouts for rollout in group]
        version = max(max([one.version, *one.sampled_by_version]) for one in rollouts)
        if newest is None or version > newest.version:
            raise WorkerEndedError(
                f"sent rollouts of adapter version {version}, which was not published yet"
            )

    def _finish(self, whole: _Whole) -> None:
        if whole.is_finished:
            self._unfinished.remove(whole)
            self._done.append(whole.result())

    # What workers are sent

    def _send_parts(self) -> None:
        for worker in self._workers:
            if self._waiting and worker.ready and not worker.sent:
                self._send(worker)
        # If there is enough for all, each worker gets a job more, for which it need not wait.
        if len(self._waiting) >= self.workers and all(len(w.sent) == 1 for w in self._workers):
            for worker in self._workers:
                self._send(worker)

    def _send(self, worker: _Worker) -> None:
        part, number = self._waiting.popleft(), next(self._numbers)
        worker.link.play(send_job(part.job, number))
        if not worker.sent:
            worker.since = time.monotonic()
        worker.sent[number] = part

    # Workers that end

    def _replace(self, worker: _Worker, how: str) -> None:
        """Start a worker that has ended again; play what it has played again, or give it up."""
        self.ended += 1
        worker.link.end()
        playing, *ahead = [*worker.sent.values(), None]
        self._waiting.extendleft(reversed([part for part in ahead if part]))
        text = f"rollout worker {worker.number} {how}"
        text += f", while it played {playing}" if playing else ""
        again = self._play_again(playing, how) if playing else ""
        if playing and playing.places.start in playing.whole.given_up:
            worker.given_up += 1
        else:
            worker.ends += 1
        if worker.ends == _ENDS_IN_A_ROW:
            raise WorkersLostError(
                f"{text}. It has ended {_ENDS_IN_A_ROW} times in a row without finishing a job"
            )
        if worker.given_up == _GIVEN_UP_IN_A_ROW:
            raise WorkersLostError(
                f"{text}. {_GIVEN_UP_IN_A_ROW} tasks in a row were given up, and it has finished "
                "none between them"
            )
        self._note(f"{text}. It starts again{again}")
        self._workers[worker.number - 1] = self._start(
            worker.number, ends=worker.ends, given_up=worker.given_up
        )

    def _start(self, number: int, *, ends: int = 0, given_up: int = 0) -> _Worker:
        link = self._transport.start(number)
        if newest := self._versions.newest:
            link.follow(newest)
        return _Worker(number, link, time.monotonic(), ends=ends, given_up=given_up)

    def _play_again(self, part: _Part, how: str) -> str:
        """Return in words what happens with the tasks of the part."""
        ended = part.ended + 1
        part.whole.ended += 1
        singles = [_Part(part.whole, range(n, n + 1), ended) for n in part.places]
        if len(singles) > 1:
            self._waiting.extendleft(reversed(singles))
            return ", and its tasks are played again one by one"
        if ended < _TRIES:
            self._waiting.extendleft(singles)
            return ", and the task is played again"
        self._give_up(part, how)
        return (
            f". The task is given up, because {ended} workers have ended with it: it is not played "
            f"again in this run, and {self.quarantine.path} names it"
        )

    def _give_up(self, part: _Part, how: str) -> None:
        place = part.places.start
        self.quarantine.add(part.whole.job.tasks[place], f"its rollout worker {how}")
        part.whole.given_up.add(place)
        self._finish(part.whole)


def _parts_without(left_out: set[int], whole: _Whole) -> Iterator[_Part]:
    """Yield the longest parts of a job without these places."""
    places = range(len(whole.job.tasks))
    for is_out, run in groupby(places, left_out.__contains__):
        if not is_out:
            first, *others = run
            yield _Part(whole, range(first, first + 1 + len(others)))


def _count(workers: int) -> str:
    return "1 rollout worker" if workers == 1 else f"{workers} rollout workers"
