"""An executor whose jobs end late and out of order, for tests of what workers may do to a run."""

from copy import deepcopy
from pathlib import Path
from random import Random

from textpolicy import activity
from textpolicy.rewards import Scorer
from textpolicy.rollout.executors.executor import FinishedJob, RolloutJob
from textpolicy.rollout.executors.in_process import InProcessExecutor
from textpolicy.types import Policy


class LateExecutor:
    """Plays each job as soon as it is submitted, and holds it back for a random time.

    So a job is sampled with the version of its submission. The tasks with an id in `poison` are
    given up. `most_groups` is the largest number of groups that were ever held at once. `followed`
    has each version, and how many jobs were submitted before it. `waits` says what the process did
    each time that it waited.
    """

    in_background = True

    def __init__(
        self,
        policy: Policy,
        scorer: Scorer,
        *,
        workers: int,
        seed: int = 0,
        promptness: float = 0.2,
        poison: frozenset[str] = frozenset(),
    ) -> None:
        self.workers = workers
        self.submitted: list[RolloutJob] = []
        self.followed: list[tuple[int, int]] = []
        self.waits: list[str] = []
        self.most_groups = 0
        self._player = InProcessExecutor(policy, scorer)
        self._held: list[FinishedJob] = []
        self._random = Random(seed)
        self._promptness = promptness
        self._poison = poison

    def follow(self, version: int, published: Path) -> None:
        self.followed.append((version, len(self.submitted)))
        self._player.follow(version, published)

    def submit(self, job: RolloutJob) -> None:
        self.submitted.append(job)
        self._player.submit(job)
        (played,) = self._player.completed(wait=True)
        given_up = [task for task in job.tasks if task.id in self._poison]
        groups = [group for group in played.groups if group.task.id not in self._poison]
        self._held.append(
            FinishedJob(
                job=job,
                # Copies, as another process sends them.
                groups=deepcopy(groups),
                seconds=played.seconds,
                reward_seconds=played.reward_seconds,
                given_up=given_up,
            )
        )
        self.most_groups = max(self.most_groups, sum(len(one.job.tasks) for one in self._held))

    def completed(self, *, wait: bool) -> list[FinishedJob]:
        if wait:
            self.waits.append(activity.described())
        self._random.shuffle(self._held)
        ended = [one for one in self._held if self._random.random() < self._promptness]
        ended = ended or self._held[: int(wait)]
        self._held = [one for one in self._held if one not in ended]
        return ended

    def restart(self, worker: int) -> None:
        held, self._held = self._held, []
        for one in held:
            self.submit(one.job)

    def close(self) -> None:
        self._held.clear()
