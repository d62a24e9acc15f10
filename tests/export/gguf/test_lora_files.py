"""GGUF files of adapters: read back, read from other programs, refused if they cannot be right."""

import random
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.export.gguf.files import rewrite
from tests.export.gguf.models import (
    PROMPTS,
    VOCABULARY,
    adapted,
    difference,
    logprobs,
    make,
)
from tests.strategies import examples
from textpolicy.adapters import Adapter, AdapterConfig, AdapterContainer, LoRARule, inspect_adapter
from textpolicy.adapters.files.gguf_layout import to_halves
from textpolicy.adapters.files.gguf_lora import read_gguf_lora
from textpolicy.errors import AdapterError
from textpolicy.export.gguf import logprobs_by_llama_cpp, write_gguf, write_gguf_lora

# Other ranks and scales for each kind of module, as one file of llama.cpp has only one alpha.
MIXED = AdapterConfig(
    rules=[
        LoRARule(module_path=".*q_proj|.*o_proj", rank=2, scale=3.0),
        LoRARule(module_path=".*embed_tokens|.*lm_head", rank=5, scale=0.7),
        LoRARule(module_path=".*", rank=4, alpha=16.0, rslora=True),
    ]
)
UNTIED = {"tie_word_embeddings": False}


class Saved(NamedTuple):
    """A model without its adapter, what it computed with the adapter, and the adapter's file."""

    model: nn.Module
    adapter: Adapter
    trained: np.ndarray
    path: Path


@pytest.fixture
def saved(tmp_path) -> Saved:
    model, architecture = make("llama", **UNTIED)
    container = adapted(model, MIXED)
    container.version = 7
    adapter, trained = container.adapter(), logprobs(model)
    path = write_gguf_lora(tmp_path / "ours.gguf", adapter, architecture)
    return Saved(container.unload(), adapter, trained, path)


def test_an_adapter_is_read_back_with_its_version_and_base_and_computes_the_same(saved):
    loaded = AdapterContainer.from_directory(saved.path).load(saved.model)
    assert difference(logprobs(saved.model), saved.trained) < 1e-5
    assert (loaded.version, loaded.fingerprint) == (7, saved.adapter.fingerprint)
    assert {module.rank for module in inspect_adapter(saved.path).modules} == {2, 4, 5}
    other = make("llama", seed=9, **UNTIED).model
    with pytest.raises(AdapterError, match="base fingerprint"):
        AdapterContainer.from_directory(saved.path).load(other)


def test_llama_cpp_computes_mixed_ranks_and_scales_and_adapted_embeddings(
    saved, load_tiny, tmp_path
):
    base = write_gguf(tmp_path / "base.gguf", saved.model, load_tiny()[1], {})
    found = logprobs_by_llama_cpp(base, PROMPTS, VOCABULARY, lora=saved.path)
    assert difference(found, saved.trained) < 1e-4


def test_an_adapter_whose_rows_are_not_permuted_is_wrong_in_llama_cpp(saved, load_tiny, tmp_path):
    base = write_gguf(tmp_path / "base.gguf", saved.model, load_tiny()[1], {})
    wrong = rewrite(saved.path, tmp_path / "wrong.gguf", tensor=in_our_order)
    found = logprobs_by_llama_cpp(base, PROMPTS, VOCABULARY, lora=wrong)
    assert difference(found, saved.trained) > 0.1


def in_our_order(name: str, array: mx.array) -> mx.array:
    heads = {"attn_q.weight.lora_b": 4, "attn_k.weight.lora_b": 2}
    count = next((n for end, n in heads.items() if name.endswith(end)), None)
    return to_halves(array, count) if count else array


@pytest.fixture
def foreign(saved, tmp_path):
    """The adapter as convert_lora_to_gguf writes it: in float16, without numbers of heads."""
    return rewrite(saved.path, tmp_path / "foreign.gguf", number_format="f16", drop=("llama.",))


def test_a_file_of_another_program_gets_the_order_of_its_rows_from_the_model(saved, foreign):
    model, trained = saved.model, saved.trained
    assert read_gguf_lora(foreign).rows_in_pairs
    loaded = AdapterContainer.from_directory(foreign).load(model)
    assert difference(logprobs(model), trained) < 0.01
    loaded.add("again", foreign)
    loaded.activate("again")
    assert difference(logprobs(model), trained) < 0.01
    loaded.swap({name: array * 0 for name, array in loaded.parameters().items()})
    loaded.swap(foreign)
    assert difference(logprobs(model), trained) < 0.01


def test_a_file_of_another_program_is_written_again_in_the_right_order(saved, foreign, tmp_path):
    _, architecture = make("llama", **UNTIED)
    again = write_gguf_lora(tmp_path / "again.gguf", read_gguf_lora(foreign), architecture)
    AdapterContainer.from_directory(again).load(saved.model)
    assert difference(logprobs(saved.model), saved.trained) < 0.01


def test_the_rows_of_a_llama_adapter_are_not_guessed_for_another_model(foreign):
    with pytest.raises(AdapterError, match="llama"):
        AdapterContainer.from_directory(foreign).load(make("qwen2", **UNTIED).model)


def test_an_alpha_of_zero_means_a_scale_of_one(saved, tmp_path):
    path = rewrite(saved.path, tmp_path / "zero.gguf", **{"adapter.lora.alpha": 0.0})
    assert {module.scale for module in inspect_adapter(path).modules} == {1.0}


REFUSED_FILES = {
    "a model": ({"general.type": "model"}, "whole model"),
    "another kind": ({"adapter.type": "ia3"}, "'lora'"),
    "an aLoRA": ({"adapter.alora.invocation_tokens": [1, 2]}, "aLoRA"),
    "a Gemma": ({"architecture": "gemma3"}, "'gemma3'"),
    "an alpha of NaN": ({"adapter.lora.alpha": float("nan")}, "alpha"),
    "an alpha of text": ({"adapter.lora.alpha": "16"}, "alpha"),
}


@pytest.mark.parametrize("case", REFUSED_FILES)
def test_a_file_that_cannot_be_read_right_is_refused(case, saved, tmp_path):
    metadata, message = REFUSED_FILES[case]
    path = rewrite(saved.path, tmp_path / "other.gguf", **metadata)
    with pytest.raises(AdapterError, match=message):
        read_gguf_lora(path)


def test_a_factor_of_the_wrong_shape_is_refused(saved, tmp_path):
    path = rewrite(saved.path, tmp_path / "cut.gguf", tensor=lambda _, array: array[1:])
    with pytest.raises(AdapterError, match="of one rank"):
        read_gguf_lora(path)


REFUSED_ADAPTERS = {
    "DoRA": ({"kind": "dora"}, "no DoRA"),
    "a bias": ({"bias": True}, "no bias"),
    "a tied embedding": ({"module_path": ".*embed_tokens"}, "output head too"),
}


@pytest.mark.parametrize("case", REFUSED_ADAPTERS)
def test_an_adapter_that_llama_cpp_would_not_compute_is_refused(case, tmp_path):
    options, message = REFUSED_ADAPTERS[case]
    model, architecture = make("llama")
    rules = [LoRARule(**{"module_path": ".*", "rank": 4} | options)]
    container = adapted(model, AdapterConfig(rules=rules))
    with pytest.raises(AdapterError, match=rf"(?s){message}.*format gguf"):
        write_gguf_lora(tmp_path / "a.gguf", container.adapter(), architecture)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_a_quantized_base_is_written_only_if_asked_for(tmp_path):
    model, architecture = make("llama")
    own = replace(adapted(model).adapter(), quantization={"bits": 4})
    with pytest.raises(AdapterError, match="over_float_base=True"):
        write_gguf_lora(tmp_path / "a.gguf", own, architecture)
    assert write_gguf_lora(tmp_path / "a.gguf", own, architecture, over_float_base=True).exists()


def test_a_model_type_without_a_family_is_refused(tmp_path):
    model, _ = make("llama")
    own = adapted(model).adapter()
    with pytest.raises(AdapterError, match=r"'gemma3'; supported are mistral, llama, .*peft"):
        write_gguf_lora(tmp_path / "a.gguf", own, {"model_type": "gemma3"})


# Damage


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """The bytes of a small adapter file."""
    model, architecture = make("qwen2", num_hidden_layers=1)
    config = AdapterConfig(rules=[LoRARule(module_path=".*k_proj", rank=1)])
    path = tmp_path_factory.mktemp("whole") / "a.gguf"
    return write_gguf_lora(path, adapted(model, config).adapter(), architecture).read_bytes()


def assert_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(AdapterError, match=r"a\.gguf"):
        read_gguf_lora(path)


def test_a_file_that_is_cut_anywhere_is_refused_by_name(whole, tmp_path):
    for size in [*range(64), *range(64, len(whole), 7), len(whole) - 32]:
        assert_refused(tmp_path / "a.gguf", whole[:size])


@pytest.mark.slow
def test_a_flipped_bit_anywhere_that_counts_is_refused_by_name(whole, tmp_path):
    dice = random.Random(0)
    path = tmp_path / "a.gguf"
    path.write_bytes(whole)
    expected = read_gguf_lora(path)
    passed = 0
    for place in dice.sample(range(len(whole)), 600):
        spoilt = bytearray(whole)
        spoilt[place] ^= 1 << dice.randrange(8)
        path.write_bytes(spoilt)
        try:
            found = read_gguf_lora(path)
        except AdapterError as error:
            assert "a.gguf" in str(error)
        else:
            # Between the tensors are bytes that mean nothing.
            passed += 1
            assert found.config == expected.config
            for name, array in expected.arrays.items():
                assert mx.array_equal(found.arrays[name], array)
    assert passed < 60


COUNTS = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1])


@pytest.mark.slow
@given(COUNTS, st.integers(0, 300))
@examples(5)
def test_any_number_in_the_header_is_read_in_bounded_time(whole, tmp_path, number, place):
    path = tmp_path / "a.gguf"
    path.write_bytes(whole[:place] + number.to_bytes(8, "little") + whole[place + 8 :])
    try:
        read_gguf_lora(path)
    except AdapterError as error:
        assert "a.gguf" in str(error)


@given(st.binary(max_size=200))
@examples(3)
def test_any_bytes_after_the_magic_are_refused(tmp_path, content):
    assert_refused(tmp_path / "a.gguf", b"GGUF" + content)
