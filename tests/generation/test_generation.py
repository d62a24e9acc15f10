"""Sampling records what it drew, and a row gives the same result alone and in a batch."""

import math
import shutil
import time
from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from tests.devices import launch_long_work
from tests.logprobs import token_logprobs
from tests.memory import peak_of
from textpolicy.errors import ConfigError, ModelError, PromptError
from textpolicy.generation.decode import decode
from textpolicy.generation.decode_step import logits_by_model
from textpolicy.generation.decoding_batch import DecodingRow, merge_batches
from textpolicy.generation.mlx_generation import create_policy, load_model
from textpolicy.generation.prefill import prefill_prompts
from textpolicy.generation.prompts import check_prompt, encode_prompt
from textpolicy.generation.sampling import draw_tokens, random_keys
from textpolicy.types import Sampling, StopReason

RAGGED = ["1+2", "Add 345 and 678, please.", "?", "Sort 9 8 7 6 5 4 3 2 1 and then say so twice"]


@pytest.fixture(scope="module")
def loaded(load_tiny):
    return load_tiny()


def recomputed_logprobs(model, completion) -> list[float]:
    tokens = mx.array([completion.prompt_tokens + completion.tokens])
    logp, _ = token_logprobs(model, tokens, mx.array([completion.sampling.temperature]))
    return logp[0, len(completion.prompt_tokens) :].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_logprobs_equal_those_that_the_trainer_computes(loaded, temperature):
    model, tokenizer = loaded
    policy = create_policy(model, tokenizer, {"temperature": temperature, "max_tokens": 20})
    groups = policy.generate(RAGGED, n=4, seed=1)
    differences = [
        abs(recorded - other)
        for group in groups
        for completion in group
        for recorded, other in zip(
            completion.logprobs, recomputed_logprobs(model, completion), strict=True
        )
    ]
    assert len(differences) > 40
    assert np.mean(differences) < 1e-4


def test_greedy_decoding_gives_the_same_tokens_in_a_batch_and_alone(loaded):
    model, tokenizer = loaded
    policy = create_policy(model, tokenizer, {"temperature": 0, "max_tokens": 24})
    together = [group[0].tokens for group in policy.generate(RAGGED)]
    assert together == [policy(prompt).tokens for prompt in RAGGED]


def test_a_row_does_not_depend_on_the_number_of_rows_beside_it(loaded):
    model, tokenizer = loaded
    prompts = [encode_prompt(tokenizer, prompt) for prompt in RAGGED]
    sampling = Sampling(max_tokens=12)

    def run(max_rows):
        groups = decode(
            model,
            prompts,
            n=3,
            sampling=sampling,
            stop=lambda tokens: StopReason.STOP_TOKEN if tokens[-1] % 5 == 0 else None,
            seed=7,
            max_rows=max_rows,
        )
        return [row.tokens for group in groups for row in group]

    at_once = run(64)
    assert run(6) == at_once
    assert run(1) == at_once
    assert len({len(tokens) for tokens in at_once}) > 1


def row_of(context, seed=0, member=0, sampling=None, stop=lambda tokens: None, **options):
    (key,) = random_keys(seed, [(0, member)])
    sampling = sampling or Sampling(max_tokens=8)
    options = {"sampling": sampling, "stop": stop, "key": key, "member": member, **options}
    return DecodingRow(context=context, **options)


class PositionCounter(nn.Module):
    """A model that counts the positions that it processes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model
        self.positions = 0

    @property
    def layers(self):
        return self.inner.layers

    def __call__(self, tokens, cache=None):
        self.positions += tokens.size
        return self.inner(tokens, cache=cache)


def test_the_prompt_of_a_group_is_prefilled_once(loaded):
    model, tokenizer = loaded
    prompt = encode_prompt(tokenizer, "A prompt of some length: 123456789")
    counting = PositionCounter(model)
    decode(
        counting,
        [prompt],
        n=8,
        sampling=Sampling(max_tokens=3),
        stop=lambda tokens: None,
        seed=0,
        max_rows=64,
    )
    assert counting.positions == (len(prompt) - 1) + 8 * 3


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["together", "apart"])
def test_memory_does_not_grow_with_the_number_of_waiting_groups(loaded, ends):
    def stop(tokens):
        early = ends == "apart" and len(tokens) > 8 and sum(tokens) % 9 == 0
        return StopReason.STOP_TOKEN if early else None

    def peak(groups):
        prompts = [[5 + (group + place) % 40 for place in range(200)] for group in range(groups)]
        limits = {"sampling": Sampling(max_tokens=40), "max_rows": 8}
        return peak_of(lambda: decode(loaded[0], prompts, n=4, stop=stop, seed=0, **limits))

    # Rows that enter one by one need room while they are added, so some groups must wait in the
    # smaller batch too. A peak is up to 1.7 times another of the same batch, because the device may
    # free arrays before or after others are made, so the smaller batch gets several trials.
    least = min(peak(64), peak(64))
    assert any(least < 1.15 * peak(16) for _ in range(6))


def test_the_stop_token_is_kept_with_its_logprob(loaded):
    model, tokenizer = loaded
    policy = create_policy(model, tokenizer, {"max_tokens": 16})
    completions = policy.generate(["347+285="] * 4, n=4, seed=0)
    stopped = [c for g in completions for c in g if c.stop_reason is StopReason.STOP_TOKEN]
    assert stopped
    for completion in stopped:
        assert completion.tokens[-1] in tokenizer.eos_token_ids
        assert len(completion.tokens) == len(completion.logprobs)
        assert completion.logprobs[-1] == pytest.approx(
            recomputed_logprobs(model, completion)[-1], abs=1e-3
        )
        assert "<|im_end|>" not in completion.text


def test_max_tokens_cuts_a_completion_off_with_stop_reason_length(loaded):
    model, tokenizer = loaded
    free = create_policy(model, tokenizer, {"max_tokens": 8, "temperature": 0})("347+285=")
    assert len(free.tokens) > 2
    cut = create_policy(model, tokenizer, {"max_tokens": 2, "temperature": 0})("347+285=")
    assert cut.tokens == free.tokens[:2]
    assert cut.stop_reason is StopReason.LENGTH


def test_a_stop_string_is_one_string_and_not_a_list_of_letters(loaded):
    policy = create_policy(*loaded, {"max_tokens": 8, "temperature": 0, "stop": "0123456789"})
    assert policy.sampling.stop == ("0123456789",)
    assert policy("347+285=").stop_reason is StopReason.STOP_TOKEN


def test_a_stop_string_ends_the_completion_with_its_tokens_kept(loaded):
    model, tokenizer = loaded
    free = create_policy(model, tokenizer, {"max_tokens": 8, "temperature": 0})("347+285=")
    character = free.text[1]
    policy = create_policy(
        model, tokenizer, {"max_tokens": 8, "temperature": 0, "stop": [character]}
    )
    stopped = policy("347+285=")
    assert stopped.stop_reason is StopReason.STOP_STRING
    assert stopped.text == free.text[: free.text.index(character) + 1]


@pytest.mark.slow
def test_a_seed_repeats_the_sequence_of_generations(loaded):
    model, tokenizer = loaded

    def two_generations(seed):
        policy = create_policy(model, tokenizer, {"max_tokens": 8, "seed": seed})
        return [policy("12+34=").tokens for _ in range(6)]

    first = two_generations(5)
    assert two_generations(5) == first
    assert two_generations(6) != first
    assert len({tuple(tokens) for tokens in first}) > 1


def test_tokens_follow_the_distribution_of_the_recorded_logprobs():
    logits = mx.log(mx.array([0.5, 0.3, 0.15, 0.05]))
    keys = mx.array(random_keys(3, [(0, member) for member in range(4000)]))
    tokens, logprobs = draw_tokens(mx.broadcast_to(logits, (4000, 4)), keys, Sampling())
    share = Counter(tokens.tolist())
    # 0.032 is four standard errors of a share of one half over 4000 draws.
    for token, probability in enumerate((0.5, 0.3, 0.15, 0.05)):
        assert share[token] / 4000 == pytest.approx(probability, abs=0.032)
    assert mx.allclose(logprobs, logits[tokens], atol=1e-6)


def test_rare_tokens_of_a_large_vocabulary_have_their_exact_chance():
    # 1000 is not a whole number of blocks. One token in three has a chance of 0.
    weights = np.arange(1, 1001, dtype=np.float64) ** 3 * (np.arange(1000) % 3 > 0)
    expected = weights / weights.sum()
    logits = mx.broadcast_to(mx.log(mx.array(weights.astype(np.float32))), (20_000, 1000))
    keys = mx.array(random_keys(0, [(0, member) for member in range(20_000)]))
    tokens, logprobs = draw_tokens(logits, keys, Sampling())
    drawn = np.array(tokens)
    assert not (drawn % 3 == 0).any()
    assert np.allclose(np.exp(np.array(logprobs)), expected[drawn], rtol=1e-5)
    # The ten hundreds of tokens have chances from 1e-4 to 0.34.
    shares = np.bincount(drawn // 100, minlength=10) / 20_000
    chances = expected.reshape(10, 100).sum(axis=1)
    assert (np.abs(shares - chances) < 4 * np.sqrt(chances / 20_000)).all()


@pytest.mark.parametrize("max_rows", [4, 64])
def test_launching_the_next_step_ahead_changes_no_result(loaded, max_rows):
    model, tokenizer = loaded
    prompts = [encode_prompt(tokenizer, prompt) for prompt in RAGGED]

    def rows(launch_ahead: bool):
        groups = decode(
            model,
            prompts,
            n=2,
            sampling=Sampling(max_tokens=12),
            stop=lambda tokens: StopReason.STOP_TOKEN if tokens[-1] % 5 == 0 else None,
            seed=2,
            max_rows=max_rows,
            launch_ahead=launch_ahead,
        )
        return [row for group in groups for row in group]

    expected, got = rows(launch_ahead=False), rows(launch_ahead=True)
    assert [row.tokens for row in got] == [row.tokens for row in expected]
    assert {row.stop_reason for row in got} == {StopReason.STOP_TOKEN, StopReason.LENGTH}
    for row, other in zip(got, expected, strict=True):
        assert np.allclose(row.logprobs, other.logprobs, atol=1e-4)


def test_the_cache_builds_a_mask_only_if_a_row_is_padded(loaded):
    model, _ = loaded

    def mask_after(*prompts: list[int]):
        return prefill_prompts(model, [[row_of(prompt)] for prompt in prompts]).cache[0]

    assert mask_after([1, 2, 3], [4, 5, 6]).make_mask(1) is None
    cache = mask_after([1, 2, 3], [4, 5])
    assert cache.make_mask(1)[1, 0, 0].tolist() == [False, True, True]
    cache.filter(mx.array([1]))
    assert cache.make_mask(1) is None
    cache.extend(mask_after([1, 2, 3]))
    assert cache.make_mask(1)[0, 0, 0].tolist() == [False, True, True]


def test_rows_are_dropped_and_the_next_step_is_built_while_the_device_computes(loaded):
    """Reading any number back would wait for all the work in flight."""
    model, _ = loaded
    batch = prefill_prompts(model, [[row_of([1, 2, 3])], [row_of([4, 5])], [row_of([6])]])
    more = prefill_prompts(model, [[row_of([7, 8, 9, 10])]])
    mx.eval(batch.last_tokens, more.last_tokens, model.parameters())
    work = launch_long_work()
    # The tokens, and all that is computed from the caches, depend on the work in flight.
    for layer in (*batch.cache, *more.cache):
        layer.keys = layer.keys + 0 * work[0, 0]
    batch.last_tokens = batch.last_tokens + (0 * work[0, 0]).astype(mx.uint32)
    merged = merge_batches(batch.keep_rows([0, 2]), more)
    logits = logits_by_model(model, merged)
    built = time.perf_counter()
    mx.eval(work)
    assert time.perf_counter() - built > 0.01
    assert logits.shape[0] == 3 and bool(mx.isfinite(logits).all())


@pytest.mark.parametrize(
    ("options", "recorded"),
    [
        ({"temperature": 0.5}, [0.25 / 0.365, 0.09 / 0.365]),
        ({"top_k": 2}, [0.625, 0.375]),
        ({"top_p": 0.75}, [0.625, 0.375]),
        ({"min_p": 0.5}, [0.625, 0.375]),
    ],
)
def test_logprobs_include_temperature_and_truncation(options, recorded):
    logits = mx.broadcast_to(mx.log(mx.array([0.5, 0.3, 0.15, 0.05])), (400, 4))
    keys = mx.array(random_keys(0, [(0, member) for member in range(400)]))
    tokens, logprobs = draw_tokens(logits, keys, Sampling(**options))
    assert set(tokens.tolist()) >= {0, 1}
    if "temperature" not in options:
        assert set(tokens.tolist()) == {0, 1}
    for token, logprob in zip(tokens.tolist(), logprobs.tolist(), strict=True):
        if token < 2:
            assert math.exp(logprob) == pytest.approx(recorded[token], abs=1e-5)


def test_a_repetition_penalty_makes_repeats_rarer(loaded):
    model, tokenizer = loaded
    options = {"max_tokens": 16, "seed": 0}
    repeats = {}
    for penalty in (1.0, 3.0):
        policy = create_policy(model, tokenizer, options | {"repetition_penalty": penalty})
        tokens = [c.tokens for g in policy.generate(RAGGED, n=2) for c in g]
        repeats[penalty] = sum(len(row) - len(set(row)) for row in tokens)
    assert repeats[3.0] < repeats[1.0]


def test_no_prompts_give_no_completions_and_n_of_zero_is_an_error(loaded):
    policy = create_policy(*loaded)
    assert policy.generate([]) == []
    with pytest.raises(ConfigError, match="n is 0"):
        policy.generate(["1+1="], n=0)


def test_the_error_for_an_unknown_option_names_the_nearest_option(loaded):
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        create_policy(*loaded, {"temprature": 1.0})


def test_a_prompt_longer_than_the_context_is_an_error(loaded):
    model, tokenizer = loaded
    policy = create_policy(model, tokenizer, {"max_tokens": 8})
    with pytest.raises(PromptError, match="exceed the model's context"):
        policy("9" * 5000)
    with pytest.raises(PromptError, match="exceed the model's context"):
        create_policy(model, tokenizer, {"max_tokens": 10**6})("1")


@pytest.mark.parametrize("option", [{"temperature": "hot"}, {"max_tokens": 2.5}, {"seed": "x"}])
def test_the_error_for_a_value_of_the_wrong_type_names_the_option(loaded, option):
    # The type checks of these tests may raise before the library checks the value.
    (name,) = option
    with pytest.raises((ConfigError, TypeCheckError), match=name):
        create_policy(*loaded, option)


@pytest.mark.parametrize("prompt", ["", [], [{"content": "no role"}], [{"role": "user"}]])
def test_an_empty_or_malformed_prompt_is_an_error(loaded, prompt):
    with pytest.raises(PromptError, match=r"empty|chat template"):
        create_policy(*loaded, {"max_tokens": 4})(prompt)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config.json": b"{"}, "is not JSON"),
        ({"config.json": b"[]"}, "expected a JSON object"),
        ({"config.json": b'{"model_type": "qwen3"}'}, "loading the model in|cannot be loaded"),
        ({"model.safetensors": b"\x10"}, "loading the model in|cannot be loaded"),
        ({"tokenizer.json": None}, "has no tokenizer"),
    ],
)
def test_a_broken_model_folder_is_a_model_error(tiny, tmp_path, change, message):
    shutil.copytree(tiny, tmp_path / "model")
    for name, content in change.items():
        (tmp_path / "model" / name).unlink()
        if content is not None:
            (tmp_path / "model" / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path / "model")


def test_the_error_for_a_missing_model_says_what_is_expected(tmp_path):
    with pytest.raises(ModelError, match="expected 'tiny', a folder"):
        load_model(tmp_path / "nothing" / "here")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(tmp_path / "empty")


def test_a_checkpoint_that_asks_to_run_code_is_refused(tmp_path):
    canary = tmp_path / "canary"
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "model_file": "evil.py"}')
    with pytest.raises(ModelError, match="refused"):
        load_model(tmp_path)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("tokens", "max_tokens", "message"),
    [
        ([], 1, "the prompt is empty"),
        ([5, 320], 1, r"token ids \[320\] are outside the vocabulary of 320"),
        ([-1], 1, r"token ids \[-1\] are outside"),
        ([5] * 1024, 1, "1024 prompt tokens"),
    ],
)
def test_token_ids_outside_the_vocabulary_or_the_context_are_an_error(
    loaded, tokens, max_tokens, message
):
    with pytest.raises(PromptError, match=message):
        check_prompt(loaded[0], tokens, max_tokens)


def test_the_longest_prompt_that_leaves_room_for_an_answer_is_accepted(loaded):
    check_prompt(loaded[0], [5] * 1000, 24)
