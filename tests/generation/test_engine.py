"""Rows enter and leave the engine at any step, and each gives what it gives alone."""

import random
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from tests.device_reads import reads_of
from tests.generation.test_generation import RAGGED, row_of
from tests.logprobs import token_logprobs
from textpolicy.generation.decoding_batch import DecodingRow
from textpolicy.generation.engine import Engine
from textpolicy.generation.prompts import encode_prompt
from textpolicy.generation.sampling import draw_by_plan, draw_tokens, plan_sampling, random_keys
from textpolicy.types import Sampling, StopReason

SAMPLINGS = [
    Sampling(max_tokens=9),
    Sampling(max_tokens=14, temperature=0.6),
    Sampling(max_tokens=11, temperature=0),
    Sampling(max_tokens=12, top_p=0.8),
    Sampling(max_tokens=8, temperature=1.3, top_k=7, min_p=0.01),
    Sampling(max_tokens=10, repetition_penalty=1.7),
]


@pytest.fixture(scope="module")
def loaded(load_tiny):
    return load_tiny()


def rows_of(tokenizer) -> list[DecodingRow]:
    """Return rows of all kinds: each has its own prompt, sampling, stop rule, key and limit."""

    def stops_at(multiple):
        return lambda tokens: StopReason.STOP_TOKEN if tokens[-1] % multiple == 0 else None

    return [
        row_of(
            encode_prompt(tokenizer, prompt),
            member=number,
            sampling=sampling,
            stop=stops_at(5 + number),
            top_logprobs=number % 3 or None,
        )
        for number, (prompt, sampling) in enumerate(
            (prompt, sampling) for prompt in RAGGED[:2] for sampling in SAMPLINGS
        )
    ]


def finished(model, rows, **options) -> list[DecodingRow]:
    engine = Engine(model, **options)
    for row in rows:
        engine.submit([row])
    while engine.can_step:
        engine.step()
    return rows


@pytest.fixture(scope="module")
def alone(loaded) -> list[DecodingRow]:
    """The rows, each decoded alone."""
    model, tokenizer = loaded
    return [finished(model, [row])[0] for row in rows_of(tokenizer)]


def assert_equal(got: list[DecodingRow], expected: list[DecodingRow]) -> None:
    assert [row.tokens for row in got] == [row.tokens for row in expected]
    assert [row.stop_reason for row in got] == [row.stop_reason for row in expected]
    for row, other in zip(got, expected, strict=True):
        assert np.allclose(row.logprobs, other.logprobs, atol=1e-4)
        assert len(row.details) == len(other.details)


@pytest.mark.parametrize("launch_ahead", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_row_gives_the_same_whenever_it_enters_and_whoever_decodes_beside_it(
    loaded, alone, seed, launch_ahead
):
    model, tokenizer = loaded
    rng = random.Random(seed)
    rows, strangers = rows_of(tokenizer), rows_of(tokenizer)
    engine = Engine(model, max_rows=rng.choice([3, 8, 64]), launch_ahead=launch_ahead)
    waiting = [*rows, *strangers]
    rng.shuffle(waiting)
    while waiting or engine.can_step:
        for row in waiting[: rng.choice([0, 0, 1, 2, 5])]:
            engine.submit([row])
            waiting.remove(row)
        if rng.random() < 0.3:
            engine.cancel(rng.choice(strangers))
        engine.step()
    assert_equal(rows, alone)
    assert {row.stop_reason for row in rows} == {StopReason.STOP_TOKEN, StopReason.LENGTH}
    assert StopReason.CANCELLED in {row.stop_reason for row in strangers}


def test_the_members_of_a_group_may_sample_in_different_ways(loaded):
    model, tokenizer = loaded
    prompt = encode_prompt(tokenizer, "12+34=")

    def group():
        return [row_of(prompt, member=m, sampling=one) for m, one in enumerate(SAMPLINGS)]

    engine, rows = Engine(model), group()
    engine.submit(rows)
    while engine.can_step:
        engine.step()
    assert_equal(rows, [finished(model, [row])[0] for row in group()])


def test_rows_that_draw_by_a_plan_draw_as_each_does_with_its_own_sampling():
    logits = mx.random.normal((12, 300), key=mx.random.key(0)) * 3
    keys = mx.array(random_keys(0, [(0, member) for member in range(12)]))
    samplings = [*SAMPLINGS, *SAMPLINGS[::-1]]
    tokens, logprobs = draw_by_plan(logits, keys, plan_sampling(samplings))
    for row, sampling in enumerate(samplings):
        token, logprob = draw_tokens(logits[row : row + 1], keys[row : row + 1], sampling)
        assert token.item() == tokens[row].item()
        assert logprob.item() == logprobs[row].item()


def test_rows_that_share_a_sampling_draw_without_a_plan():
    assert plan_sampling([Sampling(max_tokens=5), Sampling(max_tokens=9)]).place is None
    assert plan_sampling(SAMPLINGS[:2]).place is not None


def test_a_cancelled_row_frees_its_place_at_the_next_step(loaded):
    engine = Engine(loaded[0], max_rows=2)
    first, second, third = rows = [row_of([5, 6, number], member=number) for number in (1, 2, 3)]
    for row in rows:
        engine.submit([row])
    engine.step()
    assert [len(row.tokens) for row in rows] == [1, 1, 0]
    engine.cancel(first)
    engine.step()
    assert [len(row.tokens) for row in rows] == [1, 2, 1]
    engine.cancel(second)
    engine.cancel(third)
    engine.step()
    assert not engine.can_step
    assert [len(row.tokens) for row in rows] == [1, 2, 1]
    assert {row.stop_reason for row in rows} == {StopReason.CANCELLED}


def test_a_turn_that_is_cancelled_before_it_is_read_never_decodes(loaded):
    engine = Engine(loaded[0])
    row = row_of([5, 6], may_continue=True)
    engine.submit([row])
    ended = []
    while not ended:
        ended = engine.step()
    turn = engine.reply(row, [7, 8])
    engine.cancel(turn)
    assert not engine.can_step
    assert turn.stop_reason is StopReason.CANCELLED and not turn.tokens


def test_a_row_that_is_cancelled_while_it_waits_never_decodes(loaded):
    engine = Engine(loaded[0], max_rows=1)
    rows = [row_of([5, 6], member=number) for number in range(3)]
    engine.submit(rows[:1])
    engine.submit(rows[1:2])
    engine.submit(rows[2:])
    engine.cancel(rows[1])
    while engine.can_step:
        engine.step()
    assert [len(row.tokens) for row in rows] == [8, 0, 8]


def test_each_token_is_passed_to_the_row_s_listener_and_a_listener_may_cancel(loaded):
    heard: list[list[int]] = []

    def listen(row):
        heard.append(list(row.tokens))
        if len(row.tokens) == 3:
            engine.cancel(row)

    engine = Engine(loaded[0])
    row = row_of([5, 6, 7], on_token=listen)
    engine.submit([row])
    while engine.can_step:
        assert engine.step() == []
    assert heard == [row.tokens[:1], row.tokens[:2], row.tokens]
    assert row.stop_reason is StopReason.CANCELLED


@pytest.mark.parametrize("launch_ahead", [False, True])
def test_the_details_of_a_greedy_row_are_the_model_s_own_log_probabilities(loaded, launch_ahead):
    model, tokenizer = loaded
    prompt = encode_prompt(tokenizer, "Sort 3 1 2")
    (row,) = finished(
        model,
        [row_of(prompt, sampling=SAMPLINGS[2], top_logprobs=4)],
        launch_ahead=launch_ahead,
    )
    assert row.logprobs == [0.0] * len(row.tokens)
    logp, _ = token_logprobs(model, mx.array([prompt + row.tokens]), mx.ones(1))
    own = [detail.logprob for detail in row.details]
    assert np.allclose(own, logp[0, len(prompt) :], atol=1e-4)
    for token, detail in zip(row.tokens, row.details, strict=True):
        assert detail.top[0] == (token, pytest.approx(detail.logprob))
        assert len(detail.top) == 4
        assert sorted(detail.top, key=lambda pair: -pair[1]) == detail.top


def test_the_details_leave_out_temperature_truncation_and_penalty(loaded):
    model, tokenizer = loaded
    prompt = encode_prompt(tokenizer, "12+34=")
    sampling = Sampling(max_tokens=6, temperature=0.5, top_k=2, repetition_penalty=2.0)
    (row,) = finished(model, [row_of(prompt, sampling=sampling, top_logprobs=0)])
    logp, _ = token_logprobs(model, mx.array([prompt + row.tokens]), mx.ones(1))
    own = [detail.logprob for detail in row.details]
    assert np.allclose(own, logp[0, len(prompt) :], atol=1e-4)
    assert not np.allclose(own, row.logprobs, atol=1e-2)


def play(loaded, delay: int, launch_ahead: bool) -> list[DecodingRow]:
    """Play three turns of each row, with replies that come `delay` steps after a turn or later."""
    model, tokenizer = loaded
    reply = encode_prompt(tokenizer, "again")[:4]
    engine = Engine(model, max_rows=4, launch_ahead=launch_ahead)
    rows = [replace(row, may_continue=True) for row in rows_of(tokenizer)[:6]]
    turns = {row.member: [row] for row in rows}
    for row in rows:
        engine.submit([row])
    thinking: list[tuple[int, DecodingRow]] = []
    step = 0
    while thinking or engine.can_step:
        for due, row in [one for one in thinking if one[0] <= step]:
            thinking.remove((due, row))
            turns[row.member].append(engine.reply(row, reply))
        for row in engine.step():
            if len(turns[row.member]) < 3:
                engine.hold(row)
                thinking.append((step + 1 + delay + row.member % 3, row))
        step += 1
    return [turn for turns in turns.values() for turn in turns]


@pytest.fixture(scope="module")
def played(loaded) -> list[DecodingRow]:
    return play(loaded, 0, launch_ahead=False)


@pytest.mark.parametrize(("delay", "launch_ahead"), [(0, True), (1, False), (7, True)])
def test_a_row_gives_the_same_whenever_its_reply_comes(loaded, played, delay, launch_ahead):
    assert len(played) == 18
    assert_equal(play(loaded, delay, launch_ahead), played)


def test_the_turns_of_a_row_have_the_log_probabilities_of_one_forward_pass(loaded, played):
    for row in (row for row in played if row.sampling == SAMPLINGS[0]):
        logp, _ = token_logprobs(loaded[0], mx.array([row.context + row.tokens]), mx.ones(1))
        assert np.allclose(row.logprobs, logp[0, len(row.context) :], atol=1e-4)


def test_a_held_row_may_be_cancelled(loaded):
    engine = Engine(loaded[0])
    first, second = (row_of([5, 6], member=m, may_continue=True) for m in range(2))
    engine.submit([first, second])
    while engine.can_step:
        for row in engine.step():
            engine.hold(row)
    engine.cancel(first)
    turn = engine.reply(second, [7])
    while engine.can_step:
        engine.step()
    assert first.stop_reason is second.stop_reason is turn.stop_reason is StopReason.LENGTH
    assert len(turn.tokens) == 8


def test_a_row_that_waits_for_the_place_of_a_held_row_starts_when_that_is_free(loaded):
    engine = Engine(loaded[0], max_rows=1)
    first, second = (row_of([5, 6], member=m, may_continue=True) for m in range(2))
    engine.submit([first])
    engine.submit([second])
    while engine.can_step:
        for row in engine.step():
            engine.hold(row)
    assert [len(row.tokens) for row in (first, second)] == [8, 0]
    engine.cancel(first)
    assert engine.can_step
    while engine.can_step:
        engine.step()
    assert len(second.tokens) == 8


@pytest.mark.parametrize("launch_ahead", [False, True])
def test_a_step_reads_the_tokens_of_all_rows_and_nothing_else(loaded, launch_ahead):
    """Also if somebody listens to the tokens: each read waits for the device."""
    model, tokenizer = loaded
    heard: list[int] = []
    engine = Engine(model, launch_ahead=launch_ahead)
    for number, prompt in enumerate(RAGGED):
        row = row_of(encode_prompt(tokenizer, prompt), member=number, stop=lambda tokens: None)
        row.sampling = Sampling(max_tokens=30)
        row.on_token = lambda row: heard.append(row.tokens[-1])
        engine.submit([row])
    engine.step()
    reads = reads_of(lambda: [engine.step() for _ in range(6)])
    # The tokens and their log-probabilities, which the device has computed together.
    assert reads == {"array": 2 * 6}
    assert len(heard) == 7 * len(RAGGED)
