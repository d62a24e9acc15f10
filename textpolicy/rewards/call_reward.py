"""Calls of one reward function in this process, each answer held to a finite number or None."""

import inspect
import math
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence, Set, Sized
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Real
from typing import Any

from textpolicy.errors import RewardError
from textpolicy.rewards.reward_function import Reward, Sample, Score
from textpolicy.rewards.signature import Signature, read_signature
from textpolicy.user_code import raise_user_errors_as

CONCURRENCY = 16
"""How many calls of an `async def` reward are in flight together."""
_EXCERPT = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardResult:
    """One function's answer on one sample. `fault` says what went wrong; then `value` is None.

    `counts` is False on all but the first sample of a batched call that failed as a whole: one
    failure is one failure, however many samples it took along.
    """

    value: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    seconds: float = 0.0
    fault: str | None = None
    counts: bool = True


Emit = Callable[[int, RewardResult], None]
"""Takes the outcome of the sample at a position, as soon as it is known."""


@dataclass(frozen=True)
class Callee:
    """A reward function, ready to be called: its signature is read, its form is known."""

    reward: Reward

    @cached_property
    def signature(self) -> Signature:
        return read_signature(self.reward)

    @cached_property
    def is_async(self) -> bool:
        function = self.reward.function
        # An object is awaited if its __call__ is.
        call: Any = function if inspect.isroutine(function) else type(function).__call__
        return inspect.iscoroutinefunction(call) and not self.reward.batched

    def run(self, samples: Sequence[Sample], emit: Emit, limit: float | None = None) -> None:
        """Score the samples; an awaited call that takes longer than `limit` seconds is a fault."""
        if self.reward.batched:
            self._run_batch(samples, emit)
        elif self.is_async:
            _await(self._run_together(samples, emit, limit))
        else:
            for position, sample in enumerate(samples):
                emit(position, self._run_one(sample))

    def _run_one(self, sample: Sample) -> RewardResult:
        started = time.perf_counter()
        try:
            args, kwargs = self.signature.arguments(sample)
            with self._user_code(describe_sample(sample)):
                answer = self.reward(*args, **kwargs)
                if inspect.iscoroutine(answer):
                    # A partial of an async function does not look like one.
                    answer = _await(answer)
            outcome = self._outcome(answer, sample)
        except RewardError as error:
            outcome = RewardResult(fault=str(error))
        return replace(outcome, seconds=time.perf_counter() - started)

    def _run_batch(self, samples: Sequence[Sample], emit: Emit) -> None:
        started = time.perf_counter()
        try:
            answers = self._batch_answers(samples)
        except RewardError as error:
            fail_together(range(len(samples)), str(error), time.perf_counter() - started, emit)
            return
        seconds = time.perf_counter() - started
        for position, (sample, answer) in enumerate(zip(samples, answers, strict=True)):
            try:
                outcome = self._outcome(answer, sample)
            except RewardError as error:
                outcome = RewardResult(fault=str(error))
            emit(position, replace(outcome, seconds=seconds / len(samples)))

    def _batch_answers(self, samples: Sequence[Sample]) -> list[Any]:
        args, kwargs = self.signature.batch_arguments(samples)
        what = describe_batch(samples)
        with self._user_code(what):
            answers = self.reward(*args, **kwargs)
            if inspect.iscoroutine(answers):
                answers = _await(answers)
            values = list(answers) if _is_list(answers) else None
        if values is None or len(values) != len(samples):
            got = excerpt(answers) if values is None else f"{len(values)} values"
            raise RewardError(
                f"reward {self.reward.name} returned {got} ({type(answers).__name__}) for "
                f"{len(samples)} samples; expected a list with one value for each\n  {what}"
            )
        return values

    async def _run_together(
        self, samples: Sequence[Sample], emit: Emit, limit: float | None
    ) -> None:
        import asyncio  # takes as long to import as all the rest, and few rewards need it

        gate = asyncio.Semaphore(CONCURRENCY)

        async def one(position: int, sample: Sample) -> None:
            async with gate:
                started = time.perf_counter()
                outcome = await self._await_one(sample, limit)
                emit(position, replace(outcome, seconds=time.perf_counter() - started))

        await asyncio.gather(*(one(position, sample) for position, sample in enumerate(samples)))

    async def _await_one(self, sample: Sample, limit: float | None) -> RewardResult:
        import asyncio

        args, kwargs = self.signature.arguments(sample)
        clock = asyncio.timeout(limit)
        try:
            with self._user_code(describe_sample(sample)):
                async with clock:
                    answer = await self.reward(*args, **kwargs)
            return self._outcome(answer, sample)
        except RewardError as error:
            if limit is None or not clock.expired():
                return RewardResult(fault=str(error))
            return RewardResult(fault=too_late(self.reward, limit, describe_sample(sample)))

    def _outcome(self, answer: Any, sample: Sample) -> RewardResult:
        scored = isinstance(answer, Score)
        value = answer.value if scored else answer
        numbers = dict(answer.metrics) if scored else {}
        return RewardResult(
            value=None if value is None else self._number(value, sample),
            metrics={name: self._number(number, sample) for name, number in numbers.items()},
        )

    def _number(self, value: Any, sample: Sample) -> float:
        number = _to_float(value)
        if math.isfinite(number):
            return number
        # Python refuses to spell out integers of thousands of digits.
        shown = f"{number}" if isinstance(value, int) else excerpt(value)
        raise RewardError(
            f"reward {self.reward.name} returned {shown} ({type(value).__name__}); expected a "
            f"finite number, or None to leave the sample out\n  {describe_sample(sample)}"
        )

    def _user_code(self, sample: str) -> Any:
        return raise_user_errors_as(
            RewardError, f"reward {self.reward.name}", file=self.reward.file, sample=sample
        )


def fail_together(positions: Sequence[int], fault: str, seconds: float, emit: Emit) -> None:
    """The same fault for each sample of one failed call."""
    for position in positions:
        first = position == positions[0]
        emit(position, RewardResult(fault=fault, seconds=seconds, counts=first))


def too_late(reward: Reward, limit: float, sample: str) -> str:
    """The fault of a call that was stopped at its deadline."""
    return f"reward {reward.name} took longer than {limit} s and was stopped\n  {sample}"


def describe_sample(sample: Sample) -> str:
    """Which sample, for a message."""
    task = f"on task {sample.id}, " if sample.id else "on "
    return f"{task}prompt {excerpt(sample.prompt)}, completion {excerpt(sample.completion)}"


def describe_batch(samples: Sequence[Sample]) -> str:
    """Which batch, for a message."""
    return f"in a batch of {len(samples)}, the first {describe_sample(samples[0])}"


def excerpt(value: Any) -> str:
    """Enough of a text or value to know it by."""
    text = value if isinstance(value, str) else repr(value)
    cut = text if len(text) <= _EXCERPT else text[:_EXCERPT] + "…"
    return repr(cut) if isinstance(value, str) else cut


def _await(coroutine: Coroutine[Any, Any, Any]) -> Any:
    import asyncio

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    # A notebook runs us inside a loop of its own, and a thread can hold only one.
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


def _is_list(answers: Any) -> bool:
    """Whether it can be counted and has an order: lists, tuples, arrays."""
    return isinstance(answers, Sized) and not isinstance(answers, str | bytes | Mapping | Set)


def _to_float(value: Any) -> float:
    """NaN for what is no real number, infinity for a number beyond a float."""
    # numpy's bool is no Real, and importing numpy to say so would slow each child's start.
    kind = type(value)
    if not (isinstance(value, Real) or (kind.__module__, kind.__name__[:4]) == ("numpy", "bool")):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
