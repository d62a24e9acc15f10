"""Call one reward function in this process; check that it returns a finite number or None."""

import inspect
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence, Set, Sized
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from textpolicy.errors import RewardError
from textpolicy.rewards.parameters_elsewhere import parameter_hint
from textpolicy.rewards.returned_numbers import read_answer
from textpolicy.rewards.reward_function import Reward, Sample, Score
from textpolicy.user_code import describe_value, raise_user_errors_as, type_name

MAX_CONCURRENT = 16
"""How many calls of an `async def` reward are in flight together."""
_MAX_EXCERPT = 60
_MAX_SURPLUS = 1000
"""How many answers too many are counted in the message about a batch."""
_LONGEST_NOTE = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardResult:
    """What one function returned for one sample. If the call failed, `error` says why."""

    value: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    seconds: float = 0.0
    error: str | None = None
    note: str = ""


OnResult = Callable[[int, RewardResult], None]
"""Takes the position of a sample and its result, as soon as the result is known."""


def call_reward(
    reward: Reward, samples: Sequence[Sample], on_result: OnResult, await_limit: float | None = None
) -> None:
    """Call the function for all samples and pass each result to `on_result` once.

    A sample of an `async def` reward fails after `await_limit` seconds.
    """
    if reward.batched:
        _call_batch(reward, samples, on_result)
    elif reward.is_async:
        _call_async(reward, samples, on_result, await_limit)
    else:
        for position, sample in enumerate(samples):
            on_result(position, _call_once(reward, sample))


def timeout_message(reward: Reward, timeout: float, sample: str) -> str:
    """Return the error of a call that was stopped at its deadline."""
    return f"reward {reward.name} took longer than {timeout} s and was stopped\n  {sample}"


def describe_sample(sample: Sample) -> str:
    """Return the words that name a sample in a message."""
    task = f"on task {sample.id}, " if sample.id else "on "
    return f"{task}prompt {_excerpt(sample.prompt)}, completion {_excerpt(sample.completion)}"


def describe_batch(samples: Sequence[Sample]) -> str:
    """Return the words that name a batch in a message."""
    return f"in a batch of {len(samples)}, the first {describe_sample(samples[0])}"


def _call_once(reward: Reward, sample: Sample) -> RewardResult:
    started = time.perf_counter()
    described = describe_sample(sample)
    try:
        with _errors_of(reward, described):
            answer = reward.call(sample)
            if inspect.iscoroutine(answer):
                # A partial of an async function does not look like an async function.
                answer = _await(answer)
        result = _result_of(reward, answer, described)
    except RewardError as error:
        result = RewardResult(error=_describe_failure(error, reward, sample.example))
    return replace(result, seconds=time.perf_counter() - started)


def _call_batch(reward: Reward, samples: Sequence[Sample], on_result: OnResult) -> None:
    started = time.perf_counter()
    try:
        answers = _batch_answers(reward, samples)
    except RewardError as error:
        seconds = time.perf_counter() - started
        failed = RewardResult(
            error=_describe_failure(error, reward, samples[0].example), seconds=seconds
        )
        for position in range(len(samples)):
            on_result(position, failed)
        return
    seconds = (time.perf_counter() - started) / len(samples)
    for position, (sample, answer) in enumerate(zip(samples, answers, strict=True)):
        try:
            result = _result_of(reward, answer, describe_sample(sample))
        except RewardError as error:
            result = RewardResult(error=str(error))
        on_result(position, replace(result, seconds=seconds))


def _batch_answers(reward: Reward, samples: Sequence[Sample]) -> list[Any]:
    batch = describe_batch(samples)
    with _errors_of(reward, batch):
        answers = reward.call_batch(samples)
        if inspect.iscoroutine(answers):
            answers = _await(answers)
        values: list[Any] | None = None
        if _is_ordered(answers):
            # An endless list must not be read to its end.
            values = list(islice(answers, 2 * len(samples) + _MAX_SURPLUS))
    if values is None or len(values) != len(samples):
        counted = "" if values is None else f"{len(values)} values ({type_name(answers)})"
        raise RewardError(
            f"reward {reward.name} returned {counted or describe_value(answers)} for "
            f"{len(samples)} samples; expected a list with one value for each\n  {batch}"
        )
    return values


class _LoopError(RewardError):
    """The event loop of an async reward ended before all samples had their results."""


def _call_async(
    reward: Reward, samples: Sequence[Sample], on_result: OnResult, await_limit: float | None
) -> None:
    """Await the samples together. A reward that breaks their event loop fails for the others."""
    waiting = set(range(len(samples)))
    started = time.perf_counter()

    def on_one(position: int, result: RewardResult) -> None:
        waiting.discard(position)
        on_result(position, result)

    try:
        with raise_user_errors_as(_LoopError, f"the event loop of reward {reward.name}"):
            _await(_call_concurrently(reward, samples, on_one, await_limit))
    except _LoopError as error:
        for position in sorted(waiting):
            message = f"{error}\n  {describe_sample(samples[position])}"
            seconds = time.perf_counter() - started
            on_result(position, RewardResult(error=message, seconds=seconds))


async def _call_concurrently(
    reward: Reward, samples: Sequence[Sample], on_result: OnResult, await_limit: float | None
) -> None:
    import asyncio  # Importing asyncio takes as long as all the rest, and few rewards need it.

    semaphore = asyncio.Semaphore(MAX_CONCURRENT)

    async def call(position: int, sample: Sample) -> None:
        async with semaphore:
            started = time.perf_counter()
            deadline = asyncio.timeout(await_limit)
            described = describe_sample(sample)
            try:
                with _errors_of(reward, described):
                    async with deadline:
                        answer = await reward.call(sample)
                result = _result_of(reward, answer, described)
            except RewardError as error:
                message = _describe_failure(error, reward, sample.example)
                if await_limit is not None and deadline.expired():
                    message = timeout_message(reward, await_limit, described)
                result = RewardResult(error=message)
            on_result(position, replace(result, seconds=time.perf_counter() - started))

    await asyncio.gather(*(call(position, sample) for position, sample in enumerate(samples)))


def _errors_of(reward: Reward, sample: str) -> raise_user_errors_as:
    return raise_user_errors_as(
        RewardError, f"reward {reward.name}", file=reward.file, sample=sample
    )


def _describe_failure(error: RewardError, reward: Reward, columns: Collection[str]) -> str:
    """Return the message, with a hint if the function may have been written for TRL."""
    cause = error.__cause__
    if isinstance(cause, KeyError) and reward.parameters.takes_context:
        (name,) = cause.args or ("",)
        if name in columns:
            return (
                f"{error}\n  A column reaches a reward as an argument of its own, and not in "
                f"**kwargs as in TRL: write `{name}` among the parameters of {reward.name}"
            )
        if type(name) is str and (known := parameter_hint(name, batched=reward.batched)):
            return f"{error}\n  {known}"
    if "string indices must be integers" not in str(error):
        return str(error)
    return (
        f"{error}\n  A completion is a text, and not a list of messages as in TRL: leave out "
        '[0]["content"]. The parameter `messages` receives the whole conversation'
    )


def _result_of(reward: Reward, answer: Any, sample: str) -> RewardResult:
    """Return the checked answer; raise `RewardError` for what is not a finite number or None."""
    with _errors_of(reward, sample):
        # What a reward returns may be an object whose methods raise.
        read = read_answer(answer)
        note = answer.note if isinstance(answer, Score) and type(answer.note) is str else ""
    if isinstance(read, str):
        hint = ""
        if not reward.batched and type(answer) in (list, tuple):
            hint = (
                "\n  A function that takes and returns lists, as in TRL, needs "
                "@tp.reward(batched=True) above it"
            )
        raise RewardError(f"reward {reward.name} returned {read}\n  {sample}{hint}")
    value, metrics = read
    return RewardResult(value=value, metrics=metrics, note=note[:_LONGEST_NOTE])


def _is_ordered(answers: Any) -> bool:
    """Return whether the answers have a length and an order, as lists, tuples and arrays have."""
    return isinstance(answers, Sized) and not isinstance(answers, str | bytes | Mapping | Set)


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= _MAX_EXCERPT else text[:_MAX_EXCERPT] + "…")


def _await(coroutine: Coroutine[Any, Any, Any]) -> Any:
    import asyncio

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    # A notebook runs this code inside an event loop, and a thread can hold only one loop.
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()
