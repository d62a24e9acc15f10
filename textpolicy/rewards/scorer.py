"""`Scorer`: samples in, one verdict for each sample out, also while a model still decodes."""

import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from threading import Lock
from typing import Any, Generic, TypeVar

from textpolicy.activity import Activity, doing
from textpolicy.errors import RewardError, TextPolicyError, TooManyFailuresError
from textpolicy.rewards.call_reward import (
    MAX_CONCURRENT,
    RewardResult,
    call_reward,
    describe_sample,
)
from textpolicy.rewards.reward_function import Sample, sample_of
from textpolicy.rewards.weighted_rewards import Rewards, as_rewards
from textpolicy.rewards.worker_process import WorkerPool
from textpolicy.user_code import keep_process_state

_ERROR_WINDOW = 100
"""The number of last calls over which the error rate is taken; a batch has one a sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The reward of one sample, from all functions together.

    `value` is the weighted sum of `parts`, which hold each function's own reward by its name. A
    function that returned None is left out of both. `value` is None if all functions returned
    None, or if one failed and `on_error` is "skip". `error` is the message of the first failure,
    and `note` the first note of a `Score`.
    """

    value: float | None
    parts: Mapping[str, float] = field(default_factory=dict[str, float])
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    error: str | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Incident:
    """The first sample of a step on which a function failed, or the slowest sample of a step.

    `error` says why the call failed, and is None for a slow sample; `more` counts further samples.
    """

    reward: str
    sample: str
    seconds: float
    error: str | None = None
    more: int = 0

    def __str__(self) -> str:
        more = f" (and {self.more} more)" if self.more else ""
        if self.error:
            return f"{self.error}{more}"
        return f"reward {self.reward} took {self.seconds:.1f} s{more}\n  {self.sample}"


class Scorer:
    """Scores samples until it is closed; `seconds` is the time that callers have waited for it.

    `on_incident` receives at most one failing and one slow sample for each function and step.
    """

    def __init__(
        self, rewards: Rewards, *, on_incident: Callable[[Incident], None] | None = None
    ) -> None:
        self.rewards = rewards
        self.seconds = 0.0
        self._members = rewards.members
        self._names = [member.name for member in self._members]
        timeout = rewards.timeout
        self._pool = None if timeout is None else WorkerPool(rewards, timeout)
        self._on_incident = on_incident
        # For each of the last samples the number of the call that failed, or 0.
        self._failed_calls: deque[int] = deque(maxlen=_ERROR_WINDOW)
        self._calls = 0
        self.side_effects: dict[str, None] = {}
        """What rewards changed in this process, and what was therefore restored, in order."""
        self._faults: list[TextPolicyError] = []
        # By the index of the function, and whether the calls were slow; the other calls failed.
        self._to_report: dict[tuple[int, bool], list[tuple[Sample, RewardResult]]] = {}

    @property
    def can_overlap_decoding(self) -> bool:
        """Whether samples can be scored one by one in other processes while the model decodes."""
        return self._pool is not None and not any(member.batched for member in self._members)

    @property
    def parallel_samples(self) -> int:
        """The number of samples that keep all worker processes busy."""
        is_async = any(member.is_async for member in self._members)
        return self.rewards.workers * (MAX_CONCURRENT if is_async else 1)

    def state(self) -> list[int]:
        """Return which of the last calls failed, for a checkpoint: the error rate depends on it."""
        return list(self._failed_calls)

    def restore(self, state: Sequence[int]) -> None:
        """Continue from what `state()` returned."""
        self._failed_calls = deque(state, maxlen=_ERROR_WINDOW)
        self._calls = max(state, default=0)

    def close(self) -> None:
        """End the worker processes."""
        if self._pool:
            self._pool.close()

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Start the processes; raise `ConfigError` if rows lack a column that a function needs."""
        for columns in dict.fromkeys(frozenset(row) for row in rows):
            for member in self._members:
                member.check_columns(sorted(columns))
        self._to_report.clear()
        if self._pool:
            self._pool.interrupted.clear()
            self._pool.start(len(rows))

    def score(self, samples: Sequence[Sample]) -> list[Verdict]:
        """Return one verdict for each sample, in order."""
        started = time.perf_counter()
        self.prepare([sample.example for sample in samples])
        verdicts = self.score_prepared(samples) if samples else []
        self.report_incidents()
        self.seconds += time.perf_counter() - started
        return verdicts

    def score_prepared(self, samples: Sequence[Sample]) -> list[Verdict]:
        """Return verdicts after `prepare`; neither add to `seconds` nor report incidents."""
        results_F = [self._call(index, samples) for index in range(len(self._members))]
        return [self._verdict(results) for results in zip(*results_F, strict=True)]

    def report_incidents(self) -> None:
        """Pass the incidents since `prepare` to `on_incident`."""
        for (index, slow), calls in sorted(self._to_report.items(), key=itemgetter(0)):
            slowest = max(calls, key=lambda call: call[1].seconds)
            sample, result = slowest if slow else calls[0]
            if self._on_incident:
                incident = Incident(
                    reward=self._names[index],
                    sample=describe_sample(sample),
                    seconds=result.seconds,
                    error=result.error,
                    more=len(calls) - 1,
                )
                self._on_incident(incident)
        self._to_report.clear()
        self._report_faults()

    def _report_faults(self) -> None:
        if self._faults and self._on_incident:
            error, more = str(self._faults[0]), len(self._faults) - 1
            self._on_incident(
                Incident(reward="environment", sample="", seconds=0.0, error=error, more=more)
            )
        self._faults.clear()

    def count_fault(self, fault: TextPolicyError) -> None:
        """Count the failure of an environment as a failed call; raise if it must end the run."""
        self._calls += 1
        self._failed_calls.append(self._calls)
        if self.rewards.on_error == "fail":
            raise fault
        self._faults.append(fault)
        self._check_error_rate(str(fault))

    def verdict_of_fault(self, fault: TextPolicyError) -> Verdict:
        """Return the verdict on an episode whose environment failed, as `on_error` says."""
        on_error = self.rewards.on_error
        value = None if isinstance(on_error, str) else float(on_error)
        return Verdict(value=value, error=str(fault))

    def interrupt(self) -> None:
        """Make `score_prepared` in another thread raise `RewardError`, and kill its calls."""
        if self._pool:
            self._pool.interrupted.set()

    def _call(self, index: int, samples: Sequence[Sample]) -> list[RewardResult]:
        """Return one function's results, in order; raise if the errors must end the run."""
        results: dict[int, RewardResult] = {}
        with doing(f"reward {self._names[index]}", len(samples)) as activity:
            batched = self._members[index].batched
            self._calls += batched
            on_result = partial(self._record_result, results, activity, batched)
            if self._pool:
                self._pool.run(index, samples, on_result)
            else:
                with keep_process_state() as kept:
                    call_reward(self._members[index], samples, on_result)
                self.side_effects |= dict.fromkeys(kept.changed)
        for position, result in sorted(results.items()):
            if result.error or result.seconds > self.rewards.slow:
                key = (index, result.error is None)
                self._to_report.setdefault(key, []).append((samples[position], result))
        return [results[position] for position in range(len(samples))]

    def _record_result(
        self,
        results: dict[int, RewardResult],
        activity: Activity,
        batched: bool,
        position: int,
        result: RewardResult,
    ) -> None:
        if not batched:
            self._calls += 1
        self._failed_calls.append(self._calls if result.error is not None else 0)
        if result.error is not None:
            if self.rewards.on_error == "fail":
                raise RewardError(result.error)
            self._check_error_rate(result.error)
        results[position] = result
        activity.advance()

    def _check_error_rate(self, error: str) -> None:
        """Raise if too many of the last calls failed; `error` is the last of them."""
        failed, rate = [call for call in self._failed_calls if call], self.rewards.max_error_rate
        # A single batch may fail by chance, and all its samples with it.
        is_one_batch = len(failed) > len({*failed}) == 1
        if len(failed) > rate * _ERROR_WINDOW and not (rate and is_one_batch):
            raise TooManyFailuresError(
                f"{len(failed)} of the last {len(self._failed_calls)} calls of rewards and "
                f"environments failed, more than {rate:.0%} of {_ERROR_WINDOW}; the last: {error}"
            )

    def _verdict(self, results: Sequence[RewardResult]) -> Verdict:
        on_error = self.rewards.on_error
        errors = [result.error for result in results if result.error]
        if not isinstance(on_error, str):
            results = [replace(r, value=float(on_error)) if r.error else r for r in results]
        named = list(zip(self._names, results, strict=True))
        parts = {name: r.value for name, r in named if r.value is not None}
        weights = dict(zip(self._names, self.rewards.member_weights, strict=True))
        skipped = not parts or (errors and on_error == "skip")
        return Verdict(
            value=None if skipped else sum(weights[name] * part for name, part in parts.items()),
            parts=parts,
            metrics={f"{name}/{key}": x for name, r in named for key, x in r.metrics.items()},
            error=errors[0] if errors else None,
            note=next((result.note for result in results if result.note), ""),
        )


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
        self._lock = Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rewards")

    def add(self, key: _Key, sample: Sample) -> None:
        """Add a sample to score; raise the error with which an earlier sample ended the run."""
        with self._lock:
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
        waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if waiting:
            verdicts = self._scorer.score_prepared([sample for _, sample in waiting])
            self._verdicts |= zip([key for key, _ in waiting], verdicts, strict=True)


RewardLike = Callable[..., Any] | Rewards | Scorer
"""What can score samples: a function, `Rewards`, or a scorer that is open already."""


@contextmanager
def scorer_of(reward: RewardLike) -> Generator[Scorer, None, None]:
    """Yield the given scorer and leave it open, or make a scorer and close it after the block."""
    if isinstance(reward, Scorer):
        yield reward
        return
    with closing(Scorer(as_rewards(reward))) as scorer:
        yield scorer


def score(
    reward: Callable[..., Any] | Rewards,
    prompt: str,
    completion: str,
    example: Mapping[str, Any],
    **context: Any,
) -> float | None:
    """Return the reward of one completion: a finite number, or None to leave the sample out."""
    sample = sample_of(prompt, completion, example, **context)
    with scorer_of(reward) as scorer:
        return scorer.score([sample])[0].value
