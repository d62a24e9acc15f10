"""How busy the workers are: the share of their time in which they had no job."""

import time
from collections import deque

from textpolicy.rollout.executors.executor import FinishedJob
from textpolicy.types import Metrics

_STEPS = 10
"""The last steps over which the share is taken: a job may begin in one step and end in another."""


class WorkerLoad:
    """Adds up the seconds of finished jobs."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._busy = 0.0
        self._given_up = self._ended = 0
        # The start of a step, and the seconds of the jobs that finished in the step.
        self._began: float | None = None
        self._spans: deque[tuple[float, float]] = deque(maxlen=_STEPS)

    def add(self, job: FinishedJob) -> None:
        """Add a finished job. The first one shows when the workers have begun."""
        if self._began is None:
            self._began = time.perf_counter() - job.seconds
        self._busy += job.seconds
        self._given_up += len(job.given_up)
        self._ended += job.ended

    def metrics(self) -> Metrics:
        """Return the idle share over the last steps, and what went wrong in this step."""
        metrics = {
            "workers/given_up": float(self._given_up),
            "workers/ended": float(self._ended),
        }
        self._given_up = self._ended = 0
        if self._began is None:
            return metrics
        now = time.perf_counter()
        self._spans.append((now - self._began, self._busy))
        self._began, self._busy = now, 0.0
        spans, busy = map(sum, zip(*self._spans, strict=True))
        return metrics | {"workers/idle": max(0.0, 1.0 - busy / (self._workers * spans))}
