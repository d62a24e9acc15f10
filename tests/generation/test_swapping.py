"""New adapters while rows decode: each token carries the version that computed it."""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import count

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from tests.generation.test_generation import row_of
from textpolicy.adapters.container import AdapterContainer
from textpolicy.generation.decoding_batch import DecodingRow
from textpolicy.generation.engine import Engine
from textpolicy.generation.lora import create_lora_setup
from textpolicy.generation.prompts import encode_prompt
from textpolicy.types import Sampling

STEP = 0.05
"""The size of the difference between two versions: far above rounding."""


@pytest.fixture(scope="module")
def adapted(load_tiny):
    """Return a model with adapters, its tokenizer, and a function that swaps to a version."""
    model, tokenizer = load_tiny()
    model, _ = create_lora_setup(model, {"lora_rank": 4})
    model.eval()
    adapters = AdapterContainer.of(model)
    tensors = adapters.parameters()

    @cache
    def moved(version: int) -> dict[str, mx.array]:
        keys = mx.random.split(mx.random.key(version), len(tensors))
        return {
            name: tensor + STEP * mx.random.normal(tensor.shape, key=key)
            for (name, tensor), key in zip(tensors.items(), keys, strict=True)
        }

    def use(version: int) -> None:
        if version != adapters.version or version == 0:
            adapters.swap(moved(version), version=version)

    return model, tokenizer, use


def newer_each(steps: int, use: Callable[[int], None]) -> Callable[[], int]:
    """Return an engine's hook that swaps to the next version every few steps."""
    numbers: Iterator[int] = count()

    def newest() -> int:
        number = next(numbers)
        if number % steps == 0:
            use(number // steps)
        return number // steps

    return newest


def decoded_alone(model, use, turns: list[DecodingRow]) -> list[list[float]]:
    """Return the log-probability of each token of a row's turns, one position at a time.

    Every token is computed with the adapters of the version that it carries, over keys and values
    that older versions have left, and what was read before the first token of a turn is read with
    the version of this token.
    """
    layers, logprobs, read = make_prompt_cache(model), [], 0
    for turn in turns:
        use(turn.versions[0])
        text = turn.context + turn.tokens
        unread = text[read : len(turn.context) - 1]
        if unread:
            model(mx.array([unread]), cache=layers)
        logprobs.append([])
        for position, version in enumerate(turn.versions, len(turn.context)):
            use(version)
            logits = model(mx.array([[text[position - 1]]]), cache=layers)[:, -1, :]
            logprob = logits[0, text[position]] - mx.logsumexp(logits)
            logprobs[-1].append(logprob.item())
        read = len(text) - 1
    return logprobs


@pytest.mark.parametrize("launch_ahead", [False, True])
def test_each_recorded_logprob_is_that_of_the_adapters_of_the_tokens_version(adapted, launch_ahead):
    model, tokenizer, use = adapted
    sampling = Sampling(max_tokens=13)
    prompts = [encode_prompt(tokenizer, text) for text in ("12+34=", "Sort 5 3 9", "7*8")]
    rows = [row_of(prompt, member=n, sampling=sampling) for n, prompt in enumerate(prompts)]
    engine = Engine(model, launch_ahead=launch_ahead, newest_version=newer_each(3, use))
    for row in rows:
        # A row that enters later is read and begins with newer adapters.
        engine.submit([row])
        engine.step()
        engine.step()
    while engine.can_step:
        engine.step()
    assert [row.versions[0] for row in rows] == [0, 0, 1]
    assert all(row.versions == sorted(row.versions) for row in rows)
    assert all(len(set(row.versions)) >= 4 for row in rows)
    for row in rows:
        (expected,) = decoded_alone(model, use, [row])
        assert np.allclose(row.logprobs, expected, atol=1e-4)
        # The check can fail: with the weights of the last version alone, nothing is equal.
        row.versions = [row.versions[-1]] * len(row.versions)
        (other,) = decoded_alone(model, use, [row])
        assert np.abs(np.subtract(row.logprobs, other))[:-3].mean() > 1e-2


def test_a_step_that_was_launched_ahead_carries_the_version_before_the_swap(adapted):
    model, _, use = adapted
    versions = {}
    for launch_ahead in (False, True):
        row = row_of([5, 6, 7], sampling=Sampling(max_tokens=6))
        engine = Engine(model, launch_ahead=launch_ahead, newest_version=newer_each(2, use))
        engine.submit([row])
        while engine.can_step:
            engine.step()
        versions[launch_ahead] = row.versions
    assert versions == {False: [0, 0, 1, 1, 2, 2], True: [0, 0, 0, 1, 1, 2]}


@pytest.mark.parametrize("launch_ahead", [False, True])
def test_a_later_turn_keeps_the_keys_and_values_of_older_versions(adapted, launch_ahead):
    model, _, use = adapted
    turns = [row_of([5, 6, 7], sampling=Sampling(max_tokens=5), may_continue=True)]
    engine = Engine(model, launch_ahead=launch_ahead, newest_version=newer_each(3, use))
    engine.submit(turns)
    while engine.can_step:
        if engine.step() and len(turns) < 3:
            turns.append(engine.reply(turns[-1], [8, 9, 4]))
    assert len(turns) == 3
    assert len({version for turn in turns for version in turn.versions}) >= 4
    for turn, expected in zip(turns, decoded_alone(model, use, turns), strict=True):
        assert np.allclose(turn.logprobs, expected, atol=1e-4)


def test_an_engine_that_follows_no_versions_records_none(adapted):
    model, _, use = adapted
    use(0)
    rows = {}
    for hook in (None, lambda: 0):
        row = row_of([5, 6, 7], sampling=Sampling(max_tokens=7))
        engine = Engine(model, newest_version=hook)
        engine.submit([row])
        while engine.can_step:
            engine.step()
        rows[hook is None] = row
    assert rows[True].versions == []
    assert rows[False].versions == [0] * 7
    assert (rows[True].tokens, rows[True].logprobs) == (rows[False].tokens, rows[False].logprobs)
