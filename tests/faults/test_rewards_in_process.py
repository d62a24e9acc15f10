"""Rewards without a timeout run in the process of the run: `on_error` decides what they cost."""

import asyncio
import signal
from contextlib import closing
from decimal import Decimal
from fractions import Fraction
from numbers import Real

import mlx.core as mx
import numpy as np
import pytest

from tests.rewards.scoring_calls import samples, score_all
from textpolicy.errors import RewardError
from textpolicy.rewards import Rewards, Score, Scorer, reward


class Odd(BaseException):
    """An error that no `except Exception` catches."""


class Unprintable(Exception):
    def __str__(self):
        raise Odd("no message")


def raising(error):
    def method(self, *arguments):
        raise error

    return method


class Liar(Real):
    """A number whose methods raise, or a number that has no name."""

    __slots__ = ()
    __float__ = __repr__ = __len__ = __iter__ = __bool__ = __eq__ = raising(Odd("method"))
    __hash__ = None


Liar.__abstractmethods__ = frozenset()
NAMELESS = type("Nameless", (type,), {"__name__": property(raising(Odd("name")))})("X", (), {})


class EndlessList(list):
    def __iter__(self):
        while True:
            yield 1.0

    def __len__(self):
        return 2


def scored(value, metrics=None):
    """A `Score` as users can make it: without the type checks of our tests."""
    made = object.__new__(Score)
    object.__setattr__(made, "value", value)
    object.__setattr__(made, "metrics", metrics if metrics is not None else {})
    object.__setattr__(made, "note", "")
    return made


def act(completion, what):
    """Raise or return what the completion `odd` asks for, and 1.0 for the others."""
    if completion != "odd":
        return 1.0
    if isinstance(what, BaseException):
        raise what
    return what


ERRORS = [
    ValueError("no such answer"),
    StopIteration(),
    StopAsyncIteration(),
    GeneratorExit(),
    asyncio.CancelledError(),
    SystemExit(0),
    Odd("odd"),
    Unprintable(),
    RecursionError("deep"),
    MemoryError(),
    RewardError("the judge is offline"),
]
ANSWERS = [
    "1.0",
    b"1",
    1j,
    float("nan"),
    -float("inf"),
    1e300,
    -(10**400),
    10**5000,
    [1.0],
    {"reward": 1.0},
    object(),
    Liar(),
    NAMELESS(),
    Decimal("sNaN"),
    Decimal("inf"),
    np.ones(1),
    np.ones(2),
    np.float32("nan"),
    np.complex64(1),
    np.str_("1"),
    mx.array([1.0, 2.0]),
    mx.array(float("nan")),
    (x for x in [1.0]),
    scored(float("nan")),
    scored("1"),
    scored(1.0, {"a": "b"}),
    scored(1.0, {"a": float("inf")}),
    scored(1.0, {"a": Liar()}),
    scored(1.0, {1: 1.0}),
    scored(1.0, {"": 1.0}),
    scored(1.0, {"x" * 5000: 1.0}),
    scored(1.0, {"a\nb\x1b[2J": 1.0}),
    scored(1.0, {str(number): 1.0 for number in range(5000)}),
    scored(1.0, [1.0]),
    scored(1.0, 7),
]
ODD = [*ERRORS, *ANSWERS]


def in_turn(what):
    return lambda completion: act(completion, what)


def awaited(what):
    async def odd(completion):
        await asyncio.sleep(0)
        return act(completion, what)

    return odd


def in_batch(what):
    @reward(batched=True)
    def odd(completions):
        return [act(completion, what) for completion in completions]

    return odd


@pytest.mark.proves("F7")
@pytest.mark.parametrize("on_error", ["skip", -1.0])
@pytest.mark.parametrize("form", [in_turn, awaited, in_batch])
def test_every_failure_costs_its_own_sample_and_the_next_call_works(form, on_error, attempts):
    lost = None if on_error == "skip" else on_error
    for what in ODD:
        attempts.add()
        whole_batch = form is in_batch and isinstance(what, BaseException)
        rewards = Rewards(form(what), on_error=on_error, max_error_rate=1)
        with closing(Scorer(rewards)) as scorer:
            values = [v.value for v in scorer.score(samples("fine", "odd", "fine"))]
            assert values == ([lost] * 3 if whole_batch else [1.0, lost, 1.0]), repr(type(what))
            assert [v.value for v in scorer.score(samples("fine"))] == [1.0]


@pytest.mark.proves("F7")
def test_a_failure_ends_the_run_with_a_message_of_one_sample_if_on_error_is_fail(attempts):
    for what in ODD:
        attempts.add()
        with pytest.raises(RewardError) as caught:
            score_all(in_turn(what), "fine", "odd")
        message = str(caught.value)
        assert message.startswith(("reward <lambda> raised", "reward <lambda> returned"))
        assert "on prompt 'the prompt', completion 'odd'" in message
        assert len(message) < 500 and "\x1b" not in message


@pytest.mark.proves("F7")
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, 1.0),
        (Fraction(1, 4), 0.25),
        (Decimal("0.25"), 0.25),
        (np.float16(0.5), 0.5),
        (np.array(0.5), 0.5),
        (mx.array(0.5), 0.5),
        (mx.mean(mx.array([0, 1], mx.bfloat16)), 0.5),
        (mx.array(True), 1.0),
        (-0.0, 0.0),
        (1e-320, 1e-320),
        (-1e12, -1e12),
        (scored(np.float32(2), {"share": mx.array(0.5)}), 2.0),
    ],
)
def test_numbers_of_every_kind_are_rewards(value, expected, attempts):
    attempts.add()
    (verdict,) = score_all(lambda completion: value, "x")
    assert verdict.value == expected and type(verdict.value) is float


@pytest.mark.proves("F7")
@pytest.mark.parametrize("answers", [EndlessList(), [1.0] * 5, "ab", {"a": 1, "b": 2}])
def test_a_batch_with_a_wrong_number_of_answers_fails_as_a_whole(answers, attempts):
    attempts.add()

    @reward(batched=True)
    def odd(completions):
        return answers

    verdicts = score_all(Rewards(odd, on_error="skip", max_error_rate=1), "a", "b")
    assert [verdict.value for verdict in verdicts] == [None, None]
    assert "for 2 samples; expected a list with one value for each" in verdicts[0].error


@pytest.mark.proves("F7")
def test_an_async_reward_that_breaks_its_event_loop_costs_the_samples_that_wait(attempts):
    async def cancels(completion):
        if completion == "odd":
            for task in asyncio.all_tasks():
                task.cancel()
        await asyncio.sleep(0.01)
        return 1.0

    async def stops(completion):
        if completion == "odd":
            asyncio.get_running_loop().stop()
        await asyncio.sleep(0.01)
        return 1.0

    for function in (cancels, stops):
        attempts.add()
        with closing(Scorer(Rewards(function, on_error="skip", max_error_rate=1))) as scorer:
            lost = scorer.score(samples("fine", "odd"))
            assert [verdict.value for verdict in lost] == [None, None]
            assert all("CancelledError" in v.error or "event loop" in v.error for v in lost)
            assert [verdict.value for verdict in scorer.score(samples("fine"))] == [1.0]


@pytest.mark.proves("F7")
def test_ctrl_c_ends_the_scoring_and_a_keyboard_interrupt_of_a_reward_does_not(attempts):
    def presses(completion):
        signal.raise_signal(signal.SIGINT)
        return 1.0

    async def presses_and_waits(completion):
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(60)

    for function in (presses, in_turn(KeyboardInterrupt()), presses_and_waits):
        attempts.add()
        with pytest.raises(KeyboardInterrupt):
            score_all(Rewards(function, on_error="skip"), "odd")
    # A run handles Ctrl-C itself: then Python never raises KeyboardInterrupt for it.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        for form in (in_turn, awaited, in_batch):
            attempts.add()
            rewards = Rewards(form(KeyboardInterrupt()), on_error="skip", max_error_rate=1)
            (verdict,) = score_all(rewards, "odd")
            assert "raised KeyboardInterrupt" in verdict.error
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.proves("F7")
def test_a_reward_that_edits_what_it_gets_changes_nothing(attempts):
    row = {"answer": ["4"], "tests": [{"in": [1]}], "rest": {"x": 1}}
    seen = []

    def edits(prompt, completion, example, messages, turns, tokens):
        seen.append((repr(example), repr(messages), list(turns), list(tokens)))
        example["tests"][0]["in"].append(2)
        example.clear()
        messages[0]["content"] = "changed"
        turns.clear()
        tokens.clear()
        return 1.0

    def by_position(p, c, e):
        e["answer"].append("5")
        return 1.0

    @reward(batched=True)
    def all_at_once(completions, examples, answer):
        examples[0]["rest"]["x"] = answer[0][0] = 2
        return [1.0 for _ in completions]

    from textpolicy.rewards import sample_of

    for function in (edits, by_position, all_at_once):
        attempts.add()
        given = [sample_of("p", "c", row) for _ in range(3)]
        with closing(Scorer(Rewards(function))) as scorer:
            scorer.score(given)
            scorer.score(given)
        assert row == {"answer": ["4"], "tests": [{"in": [1]}], "rest": {"x": 1}}
    assert len(set(map(repr, seen))) == 1
