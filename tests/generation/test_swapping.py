"""New adapters while rows decode: each token carries the version that computed it."""

from collections.abc import Callable
from itertools import count

import numpy as np
import pytest

from tests.adapter_versions import AdapterVersions
from tests.generation.test_generation import row_of
from textpolicy.generation import policy as policy_module
from textpolicy.generation.decoding_batch import DecodingRow
from textpolicy.generation.engine import Engine
from textpolicy.generation.policy import ModelPolicy
from textpolicy.generation.prompts import encode_prompt
from textpolicy.types import NOT_SAMPLED, Sampling, Segment

PROMPTS = ["12+34=", "Sort 5 3 9", "7*8"]


@pytest.fixture(scope="module")
def loaded(load_tiny):
    return load_tiny()


@pytest.fixture(scope="module")
def versions(loaded, tmp_path_factory) -> AdapterVersions:
    return AdapterVersions(loaded[0], tmp_path_factory.mktemp("versions"), 12)


def newer_each(steps: int, use: Callable[[int], None]) -> Callable[[], int]:
    """Return an engine's hook that swaps to the next version every few steps."""
    numbers = count()

    def newest() -> int:
        version, rest = divmod(next(numbers), steps)
        if rest == 0:
            use(version)
        return version

    return newest


def segment_of(*turns: DecodingRow) -> Segment:
    """Return the tokens of the turns of a row with their versions."""
    tokens = turns[-1].context + turns[-1].tokens
    mask, logprobs, versions = (
        [False] * len(tokens),
        [0.0] * len(tokens),
        [NOT_SAMPLED] * len(tokens),
    )
    for turn in turns:
        where = slice(len(turn.context), len(turn.context) + len(turn.tokens))
        mask[where], logprobs[where] = [True] * len(turn.tokens), turn.logprobs
        versions[where] = turn.versions
    return Segment(tokens=tokens, mask=mask, logprobs=logprobs, versions=versions)


@pytest.mark.parametrize("launch_ahead", [False, True])
def test_each_recorded_logprob_is_that_of_the_adapters_of_the_tokens_version(
    loaded, versions, launch_ahead
):
    model, tokenizer = loaded
    prompts = [encode_prompt(tokenizer, text) for text in PROMPTS]
    sampling = Sampling(max_tokens=13)
    rows = [row_of(prompt, member=n, sampling=sampling) for n, prompt in enumerate(prompts)]
    engine = Engine(model, launch_ahead=launch_ahead, newest_version=newer_each(3, versions.use))
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
        segment = segment_of(row)
        assert np.allclose(segment.logprobs, versions.replay(segment), atol=1e-4)


def test_versions_that_are_off_by_one_swap_would_be_noticed(loaded, versions):
    model, _ = loaded
    row = row_of([5, 6, 7], sampling=Sampling(max_tokens=12))
    engine = Engine(model, newest_version=newer_each(3, versions.use))
    engine.submit([row])
    while engine.can_step:
        engine.step()
    row.versions = [row.versions[0], *row.versions[:-1]]
    segment = segment_of(row)
    off = np.abs(np.subtract(segment.logprobs, versions.replay(segment)))[len(row.context) :]
    # The first token of each version now has the version before.
    assert off[3::3].min() > 1e-2


def test_a_step_that_was_launched_ahead_carries_the_version_before_the_swap(loaded, versions):
    recorded = {}
    for launch_ahead in (False, True):
        row = row_of([5, 6, 7], sampling=Sampling(max_tokens=6))
        hook = newer_each(2, versions.use)
        engine = Engine(loaded[0], launch_ahead=launch_ahead, newest_version=hook)
        engine.submit([row])
        while engine.can_step:
            engine.step()
        recorded[launch_ahead] = row.versions
    assert recorded == {False: [0, 0, 1, 1, 2, 2], True: [0, 0, 0, 1, 1, 2]}


@pytest.mark.parametrize("launch_ahead", [False, True])
def test_a_later_turn_keeps_the_keys_and_values_of_older_versions(loaded, versions, launch_ahead):
    turns = [row_of([5, 6, 7], sampling=Sampling(max_tokens=5), may_continue=True)]
    hook = newer_each(3, versions.use)
    engine = Engine(loaded[0], launch_ahead=launch_ahead, newest_version=hook)
    engine.submit(turns)
    while engine.can_step:
        if engine.step() and len(turns) < 3:
            turns.append(engine.reply(turns[-1], [8, 9, 4]))
    segment = segment_of(*turns)
    assert len(turns) == 3
    assert len({*segment.versions}) > 4
    assert np.allclose(segment.logprobs, versions.replay(segment), atol=1e-4)


def test_an_engine_that_follows_no_versions_records_none_and_samples_the_same(loaded, versions):
    versions.use(3)
    rows = {}
    for hook in (None, lambda: 3):
        row = rows[hook is None] = row_of([5, 6, 7], sampling=Sampling(max_tokens=7))
        engine = Engine(loaded[0], newest_version=hook)
        engine.submit([row])
        while engine.can_step:
            engine.step()
    assert rows[True].versions == []
    assert rows[False].versions == [3] * 7
    assert (rows[True].tokens, rows[True].logprobs) == (rows[False].tokens, rows[False].logprobs)


def test_a_policy_takes_what_another_process_publishes_while_it_generates(
    loaded, versions, tmp_path
):
    path, sampling = tmp_path / "adapters.safetensors", Sampling(max_tokens=40, temperature=3.0)
    with versions.published_in_turn(path):
        between_tokens = ModelPolicy(*loaded, sampling, follow=path, swap="tokens")
        together = [one for (one,) in between_tokens.generate(PROMPTS, seed=0)]
        between_completions = ModelPolicy(*loaded, sampling, follow=path)
        others = [one for (one,) in between_completions.generate(PROMPTS, seed=0)]
    longest = max(together, key=lambda one: len(one.tokens))
    assert len({*longest.versions}) > 1
    for one in together:
        assert one.version == min(one.versions, default=one.version)
        read = len(one.prompt_tokens)
        segment = Segment(
            tokens=one.prompt_tokens + one.tokens,
            mask=[False] * read + [True] * len(one.tokens),
            logprobs=[0.0] * read + one.logprobs,
            versions=[NOT_SAMPLED] * read + (one.versions or [one.version] * len(one.tokens)),
        )
        expected = versions.replay(segment, temperature=sampling.temperature)
        assert np.allclose(segment.logprobs, expected, atol=1e-4)
    assert [one.versions for one in others] == [[]] * len(PROMPTS)
    assert len({one.version for one in others}) == 1


@pytest.mark.parametrize("launch_ahead", [False, True])
def test_another_way_to_load_newer_adapters_replaces_the_file(
    loaded, versions, launch_ahead, monkeypatch
):
    monkeypatch.setattr(policy_module, "can_launch_ahead", lambda: launch_ahead)
    versions.use(0)
    policy = ModelPolicy(*loaded, Sampling(max_tokens=9, temperature=9.0), swap="tokens")
    calls = count(1)

    def load_newer() -> bool:
        if is_time := next(calls) % 3 == 0:
            versions.use(policy.version + 1)
        return is_time

    policy.load_newer = load_newer
    completion = policy.generate(["7*8"], seed=1)[0][0]
    # A step that was launched ahead has the adapters of the token before.
    expected = [0] * launch_ahead + [0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert completion.versions == expected[: len(completion.tokens)]
    assert completion.version == 0 and len(completion.tokens) > 5
    policy.load_newer = None
    assert policy.generate(["7*8"], seed=1)[0][0].versions == []
