"""`BackgroundScorer`: score finished completions while the model decodes the rest of the step."""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from textpolicy.rewards.reward_function import Sample
from textpolicy.rewards.scorer import Scorer, Verdict

_Key = TypeVar("_Key")


class BackgroundScorer(Generic[_Key]):
    """Scores samples in a thread, as soon as there are enough to keep the scorer's processes busy.

    The scorer must be prepared and must be able to overlap decoding. Only the time that `verdicts`
    waits counts as the scorer's `seconds`.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._waiting: deque[tuple[_Key, Sample]] = deque()
        self._calls: deque[Future[None]] = deque()
        self._verdicts: dict[_Key, Verdict] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rewards")

    def add(self, key: _Key, sample: Sample) -> None:
        """Add a sample to score; raise the error with which an earlier sample ended the run."""
        while self._calls and self._calls[0].done():
            self._calls.popleft().result()
        self._waiting.append((key, sample))
        if len(self._waiting) >= self._scorer.parallel_samples:
            self._calls.append(self._thread.submit(self._score_waiting))

    def verdicts(self) -> dict[_Key, Verdict]:
        """Wait for the last sample and return the verdicts of all, by their keys."""
        started = time.perf_counter()
        self._calls.append(self._thread.submit(self._score_waiting))
        while self._calls:
            self._calls.popleft().result()
        self._scorer.report_incidents()
        self._scorer.seconds += time.perf_counter() - started
        return self._verdicts

    def close(self) -> None:
        """Start no further call, and interrupt the calls that are not finished."""
        if self._calls:
            self._scorer.interrupt()
        self._thread.shutdown(cancel_futures=True)

    def _score_waiting(self) -> None:
        keys: list[_Key] = []
        samples: list[Sample] = []
        while self._waiting:
            key, sample = self._waiting.popleft()
            keys.append(key)
            samples.append(sample)
        if samples:
            self._verdicts |= zip(keys, self._scorer.score_prepared(samples), strict=True)
