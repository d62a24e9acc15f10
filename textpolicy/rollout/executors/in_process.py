"""The executor without workers: the policy of this process plays the jobs, one after the other."""

import time
from collections import deque
from pathlib import Path

from textpolicy.errors import TrainingError
from textpolicy.rewards import Scorer
from textpolicy.rollout.executors.executor import FinishedJob, RolloutJob
from textpolicy.rollout.worker import collect
from textpolicy.types import Policy


class InProcessExecutor:
    """Plays a job when its result is waited for, so that each job has the newest adapters."""

    workers = 1
    in_background = False

    def __init__(self, policy: Policy, scorer: Scorer) -> None:
        self._policy = policy
        self._scorer = scorer
        self._jobs: deque[RolloutJob] = deque()

    def follow(self, version: int, published: Path) -> None:
        """Reload the policy, unless it has that version already."""
        reload_policy(self._policy, version, published)

    def submit(self, job: RolloutJob) -> None:
        self._jobs.append(job)

    def completed(self, *, wait: bool) -> list[FinishedJob]:
        """Play the next job and return it; without `wait`, play nothing and return nothing."""
        if not wait or not self._jobs:
            return []
        job = self._jobs.popleft()
        started, scored = time.perf_counter(), self._scorer.seconds
        groups = collect(
            job.tasks,
            self._policy,
            self._scorer,
            group_size=job.group_size,
            seed=job.seed,
            first=job.first,
        )
        finished = FinishedJob(
            job=job,
            groups=groups,
            seconds=time.perf_counter() - started,
            reward_seconds=self._scorer.seconds - scored,
        )
        return [finished]

    def restart(self, worker: int) -> None:
        """Return at once: there is no process to end, and unfinished jobs stay in the queue."""

    def close(self) -> None:
        self._jobs.clear()


def reload_policy(policy: Policy, version: int, published: Path) -> None:
    """Let the policy load a published version, unless it has that version already."""
    if policy.version == version:
        return
    policy.reload(published)
    if policy.version != version:
        raise TrainingError(
            f"the policy still generates with version {policy.version} after reloading "
            f"{published}; expected version {version}. Make the policy's reload() load that file "
            "and return its version"
        )
