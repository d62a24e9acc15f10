"""Verdicts on what is written already, while the rest is still being written."""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from textpolicy.rewards.reward_function import Sample
from textpolicy.rewards.scorer import Scorer, Verdict

Key = TypeVar("Key")


class BackgroundScorer(Generic[Key]):
    """Scores samples from when enough were added to keep the scorer's processes busy.

    For a scorer that `overlaps` and was prepared. What is waited for at the end is what counts as
    its `seconds`.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._waiting: deque[tuple[Key, Sample]] = deque()
        self._calls: deque[Future[None]] = deque()
        self._verdicts: dict[Key, Verdict] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rewards")

    def add(self, key: Key, sample: Sample) -> None:
        """Score this with others. Raises what an earlier one ended the run with."""
        while self._calls and self._calls[0].done():
            self._calls.popleft().result()
        self._waiting.append((key, sample))
        if len(self._waiting) >= self._scorer.width:
            self._calls.append(self._thread.submit(self._score_waiting))

    def verdicts(self) -> dict[Key, Verdict]:
        """All of them, once the last is there."""
        started = time.perf_counter()
        self._calls.append(self._thread.submit(self._score_waiting))
        while self._calls:
            self._calls.popleft().result()
        self._scorer.report_incidents()
        self._scorer.seconds += time.perf_counter() - started
        return self._verdicts

    def close(self) -> None:
        """Begin nothing more, and break off what is not finished."""
        if self._calls:
            self._scorer.interrupt()
        self._thread.shutdown(cancel_futures=True)

    def _score_waiting(self) -> None:
        keys: list[Key] = []
        samples: list[Sample] = []
        while self._waiting:
            key, sample = self._waiting.popleft()
            keys.append(key)
            samples.append(sample)
        if samples:
            self._verdicts |= zip(keys, self._scorer.score_prepared(samples), strict=True)
