"""Rewards at work: samples in, one verdict for each out."""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from textpolicy.errors import RewardError
from textpolicy.rewards.call_reward import CONCURRENCY, Callee, Emit, RewardResult, describe_sample
from textpolicy.rewards.children import Children
from textpolicy.rewards.reward_function import Sample, sample_of
from textpolicy.rewards.signature import check_columns
from textpolicy.rewards.weighted_rewards import Rewards, as_rewards

WINDOW = 100
"""The number of last calls that the error rate is taken over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What all functions together say of one sample.

    `value` is the weighted sum of `parts`, each function's own reward by its name. A function that
    returned None is left out of both; `value` is None if all did, or if one failed and the sample
    is skipped. `error` is the message of the first that failed.
    """

    value: float | None
    parts: Mapping[str, float] = field(default_factory=dict[str, float])
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Incident:
    """The first sample of a step that a function failed on, or the slowest.

    `fault` says how it failed, and is None for one that was slow; `more` counts the others.
    """

    reward: str
    sample: str
    seconds: float
    fault: str | None = None
    more: int = 0

    def __str__(self) -> str:
        more = f" (and {self.more} more)" if self.more else ""
        if self.fault:
            return f"{self.fault}{more}"
        return f"reward {self.reward} took {self.seconds:.1f} s{more}\n  {self.sample}"


@runtime_checkable
class Runner(Protocol):
    """Calls functions, here or elsewhere."""

    def run(self, index: int, samples: Sequence[Sample], emit: Emit) -> None:
        """Score the samples with the function at `index`, emitting each outcome once."""
        ...

    def start(self, count: int) -> None:
        """Get ready for `count` calls."""
        ...

    def close(self) -> None:
        """Nothing follows."""
        ...


class InProcess:
    """Runs rewards here: nothing to start, and nothing that could be killed."""

    def __init__(self, callees: Sequence[Callee]) -> None:
        self._callees = callees

    def run(self, index: int, samples: Sequence[Sample], emit: Emit) -> None:
        self._callees[index].run(samples, emit)

    def start(self, count: int) -> None:
        return

    def close(self) -> None:
        return


class Scorer:
    """Scores samples until it is closed, in `seconds` altogether.

    `on_incident` is told of failing and of slow samples, at most one of each for each function
    and step.
    """

    def __init__(
        self, rewards: Rewards, *, on_incident: Callable[[Incident], None] | None = None
    ) -> None:
        self.rewards = rewards
        self.seconds = 0.0
        self._callees = [Callee(reward) for reward in rewards.members]
        self._interrupted = threading.Event()
        self._runner: Runner = (
            InProcess(self._callees)
            if rewards.timeout is None
            else Children(
                self._callees,
                timeout=rewards.timeout,
                workers=rewards.workers,
                memory=None if rewards.memory_gb is None else int(rewards.memory_gb * 1e9),
                interrupted=self._interrupted,
            )
        )
        self._on_incident = on_incident
        self._failed: deque[bool] = deque(maxlen=WINDOW)
        self._incidents: dict[tuple[int, bool], Incident] = {}

    @property
    def can_overlap_decoding(self) -> bool:
        """Whether samples can be scored while others are written: elsewhere, and each by itself."""
        alone = not any(reward.batched for reward in self.rewards.members)
        return alone and self.rewards.timeout is not None

    @property
    def width(self) -> int:
        """How many samples keep all of its processes busy."""
        waits = any(callee.is_async for callee in self._callees)
        return self.rewards.workers * (CONCURRENCY if waits else 1)

    def state(self) -> list[bool]:
        """Which of the last calls failed: what the error rate to come depends on."""
        return list(self._failed)

    def restore(self, state: Sequence[bool]) -> None:
        """Go on from what `state()` returned."""
        self._failed = deque(state, maxlen=WINDOW)

    def close(self) -> None:
        """End the processes that were started."""
        self._runner.close()

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Before anything is sampled for these rows: do they have the columns that are asked for?

        Raises `ConfigError` for the first that does not, and starts what will be needed.
        """
        for columns in dict.fromkeys(frozenset(row) for row in rows):
            for callee in self._callees:
                check_columns(callee.reward, callee.signature, sorted(columns))
        self._interrupted.clear()
        self._incidents.clear()
        self._runner.start(len(rows))

    def score(self, samples: Sequence[Sample]) -> list[Verdict]:
        """One verdict for each sample, in order."""
        started = time.perf_counter()
        self.prepare([sample.example for sample in samples])
        verdicts = self.score_prepared(samples)
        self.report_incidents()
        self.seconds += time.perf_counter() - started
        return verdicts

    def score_prepared(self, samples: Sequence[Sample]) -> list[Verdict]:
        """`score` for some of the samples that were prepared for: neither are its seconds counted,
        nor is anybody told of incidents yet.
        """
        outcomes_F = [self._outcomes(index, samples) for index in range(len(self._callees))]
        return [self._verdict(outcomes) for outcomes in zip(*outcomes_F, strict=True)]

    def report_incidents(self) -> None:
        """Tell of those since `prepare`: of each function's first failure and slowest call."""
        for key in sorted(self._incidents):
            if self._on_incident:
                self._on_incident(self._incidents[key])
        self._incidents.clear()

    def interrupt(self) -> None:
        """From another thread: let `judge` end with an error, and kill what it waits for."""
        self._interrupted.set()

    def _outcomes(self, index: int, samples: Sequence[Sample]) -> list[RewardResult]:
        """One function's outcomes; a failure ends this early where the run is not to go on."""
        outcomes: dict[int, RewardResult] = {}

        def emit(position: int, outcome: RewardResult) -> None:
            self._admit(outcome)
            outcomes[position] = outcome

        self._runner.run(index, samples, emit)
        ordered = [outcomes[position] for position in range(len(samples))]
        self._note_incidents(index, samples, ordered)
        return ordered

    def _admit(self, outcome: RewardResult) -> None:
        if outcome.counts:
            self._failed.append(outcome.fault is not None)
        if outcome.fault is None:
            return
        if self.rewards.on_error == "fail":
            raise RewardError(outcome.fault)
        if sum(self._failed) > self.rewards.max_error_rate * WINDOW:
            raise RewardError(
                f"{sum(self._failed)} of the last {len(self._failed)} calls of rewards failed, "
                f"more than {self.rewards.max_error_rate:.0%} of {WINDOW}; the last: "
                f"{outcome.fault}"
            )

    def _note_incidents(
        self, index: int, samples: Sequence[Sample], outcomes: Sequence[RewardResult]
    ) -> None:
        name = self._callees[index].reward.name
        for outcome, sample in zip(outcomes, samples, strict=True):
            if outcome.fault is None and outcome.seconds <= self.rewards.slow:
                continue
            key = (index, outcome.fault is None)
            before = self._incidents.get(key)
            # The first failure stays, and the slowest call.
            if before and (outcome.fault or before.seconds >= outcome.seconds):
                self._incidents[key] = replace(before, more=before.more + 1)
                continue
            self._incidents[key] = Incident(
                reward=name,
                sample=describe_sample(sample),
                seconds=outcome.seconds,
                fault=outcome.fault,
                more=before.more + 1 if before else 0,
            )

    def _verdict(self, outcomes: Sequence[RewardResult]) -> Verdict:
        policy = self.rewards.on_error
        faults = [outcome.fault for outcome in outcomes if outcome.fault]
        if not isinstance(policy, str):
            outcomes = [replace(o, value=float(policy)) if o.fault else o for o in outcomes]
        names = [callee.reward.name for callee in self._callees]
        named = list(zip(names, outcomes, strict=True))
        parts = {name: o.value for name, o in named if o.value is not None}
        weights = dict(zip(names, self.rewards.shares, strict=True))
        skipped = not parts or (faults and policy == "skip")
        return Verdict(
            value=None if skipped else sum(weights[name] * part for name, part in parts.items()),
            parts=parts,
            metrics={f"{name}/{key}": x for name, o in named for key, x in o.metrics.items()},
            error=faults[0] if faults else None,
        )


RewardLike = Callable[..., Any] | Rewards | Scorer
"""What can score: a function, several with their options, or a scorer that is open already."""


@contextmanager
def scorer_of(reward: RewardLike) -> Generator[Scorer, None, None]:
    """A scorer for the block: the one given, left open, or one of these functions, then closed."""
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
    """The reward of one completion: a finite number, or None for a sample not to be scored."""
    sample = sample_of(prompt, completion, example, **context)
    with closing(Scorer(as_rewards(reward))) as scorer:
        return scorer.score([sample])[0].value
