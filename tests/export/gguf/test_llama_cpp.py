"""llama.cpp itself computes from our GGUF files what mlx computes from the model.

Most of the time of these tests is the start of llama.cpp, about half a second each.
"""

from typing import Any

import pytest
from tokenizers import normalizers

from tests.export.gguf.files import rewrite
from tests.export.gguf.models import (
    LINEAR,
    LLAMA3,
    PROMPTS,
    VOCABULARY,
    YARN,
    adapted,
    difference,
    logprobs,
    make,
)
from tests.export.gguf.tokenizers import PLAIN, WIDE, odd_texts, tokenizer_with
from tests.quick import quick_first
from textpolicy.adapters import AdapterContainer
from textpolicy.errors import ModelError
from textpolicy.export.gguf import (
    compare_tokens_with_llama_cpp,
    logprobs_by_llama_cpp,
    read_gguf_model,
    tokens_by_llama_cpp,
    write_gguf,
    write_gguf_lora,
)
from textpolicy.export.gguf.pretokenizers import PRE_TOKENIZERS
from textpolicy.export.gguf.token_check import DIFFICULT_TEXTS

TOLERANCE = 1e-4
BIASES = {"attention_bias": True, "mlp_bias": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with a head and wide heads": ("llama", {"tie_word_embeddings": False, "head_dim": 32}),
    "llama with biases": ("llama", BIASES),
    "llama scaled as Llama 3": ("llama", {"rope_scaling": LLAMA3}),
    "llama scaled linearly": ("llama", {"rope_scaling": LINEAR}),
    "llama scaled by yarn": ("llama", {"rope_scaling": YARN}),
    "mistral whose window mlx-lm ignores": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2 scaled by yarn": ("qwen2", {"rope_scaling": YARN}),
    "qwen3": ("qwen3", {}),
    "qwen3 scaled by yarn": ("qwen3", {"rope_scaling": YARN, "tie_word_embeddings": False}),
    "qwen3_moe": ("qwen3_moe", {"tie_word_embeddings": False}),
    "smollm3": ("smollm3", {}),
}
# Weights are rounded to a number format, and llama.cpp rounds what they are multiplied with too.
# Measured on the embedded model: 0.0025, 0.022 and 0.08.
ROUNDING = {"f16": 0.01, "bf16": 0.06, "q8_0": 0.2}


@pytest.fixture(scope="module")
def tokenizer(load_tiny):
    return load_tiny()[1]


@pytest.mark.parametrize("name", quick_first(2, MODELS))
def test_llama_cpp_computes_what_mlx_does_with_an_adapter_and_without(name, tokenizer, tmp_path):
    model_type, changes = MODELS[name]
    model, architecture = make(model_type, **changes)
    check_in_llama_cpp(model, architecture, tokenizer, tmp_path)


@pytest.mark.slow
def test_the_embedded_model_is_the_same_in_llama_cpp_with_its_adapter_and_merged(
    load_tiny, tiny_architecture, tmp_path
):
    model, tokenizer = load_tiny()
    trained = check_in_llama_cpp(model, tiny_architecture, tokenizer, tmp_path)
    AdapterContainer.of(model).fuse()
    merged = write_gguf(tmp_path / "merged.gguf", model, tokenizer, tiny_architecture)
    assert difference(logprobs_by_llama_cpp(merged, PROMPTS, VOCABULARY), trained) < TOLERANCE
    compare_tokens_with_llama_cpp(merged, tokenizer)


@pytest.mark.parametrize("number_format", quick_first(1, ROUNDING))
def test_a_number_format_rounds_no_more_than_it_says(
    number_format, load_tiny, tiny_architecture, tmp_path
):
    model, tokenizer = load_tiny()
    # The embedded model is in bfloat16, which would hide the rounding.
    adapted(model)
    AdapterContainer.of(model).fuse()
    path = tmp_path / "model.gguf"
    write_gguf(path, model, tokenizer, tiny_architecture, number_format=number_format)
    expected, bound = logprobs(model), ROUNDING[number_format]
    assert 0 < difference(logprobs(read_gguf_model(path)), expected) < bound
    assert 0 < difference(logprobs_by_llama_cpp(path, PROMPTS, VOCABULARY), expected) < bound


@pytest.mark.parametrize("scaling", [LLAMA3, YARN, LINEAR], ids=lambda one: str(one.values()))
def test_a_scaling_of_positions_makes_a_difference_that_the_tolerance_sees(scaling):
    plain, scaled = (logprobs(make("llama", rope_scaling=one).model) for one in (None, scaling))
    assert difference(plain, scaled) > 100 * TOLERANCE


@pytest.mark.parametrize("name", quick_first(1, PRE_TOKENIZERS))
def test_llama_cpp_makes_the_same_tokens_by_a_pre_tokenizer_of_the_table(name, tmp_path):
    tokenizer = tokenizer_with(name)
    model, architecture = make("llama", vocab_size=len(tokenizer.get_vocab()) + 4)
    path = write_gguf(tmp_path / "model.gguf", model, tokenizer, architecture)
    texts = [*DIFFICULT_TEXTS, f"x{WIDE} {PLAIN}{PLAIN}y {PLAIN[:-1]} >", *odd_texts(600)]
    found = tokens_by_llama_cpp(path, texts)
    pairs = zip(texts, found, strict=True)
    assert [text for text, own in pairs if own != tokenizer.encode(text)] == []


def test_llama_cpp_makes_the_same_tokens_of_text_that_is_in_nfc(tmp_path):
    tokenizer = tokenizer_with("qwen2", normalizer=normalizers.NFC())
    model, architecture = make("qwen2", vocab_size=len(tokenizer.get_vocab()))
    path = write_gguf(tmp_path / "model.gguf", model, tokenizer, architecture)
    compare_tokens_with_llama_cpp(path, tokenizer)


def test_a_file_with_the_pre_tokenizer_of_another_model_is_found_out(tmp_path):
    tokenizer = tokenizer_with("qwen2")
    model, architecture = make("llama", vocab_size=len(tokenizer.get_vocab()))
    path = write_gguf(tmp_path / "right.gguf", model, tokenizer, architecture)
    compare_tokens_with_llama_cpp(path, tokenizer)
    wrong = rewrite(path, tmp_path / "wrong.gguf", **{"tokenizer.ggml.pre": "gpt-2"})
    with pytest.raises(ModelError, match="other tokens than the tokenizer of the text"):
        compare_tokens_with_llama_cpp(wrong, tokenizer)


def test_llama_cpp_adds_the_same_tokens_around_a_text(tmp_path):
    tokenizer = tokenizer_with("llama-bpe", begin="<|endoftext|>")
    model, architecture = make("llama", vocab_size=len(tokenizer.get_vocab()))
    path = write_gguf(tmp_path / "model.gguf", model, tokenizer, architecture)
    expected = tokenizer.encode("Hi")
    assert expected[0] == tokenizer.bos_token_id
    assert tokens_by_llama_cpp(path, ["Hi"]) == [expected]


def check_in_llama_cpp(model, architecture, tokenizer, folder):
    """Compare base and adapter with llama.cpp, and return what the adapted model computes."""
    base = logprobs(model)
    file = write_gguf(folder / "base.gguf", model, tokenizer, architecture)
    assert difference(logprobs_by_llama_cpp(file, PROMPTS, VOCABULARY), base) < TOLERANCE
    assert difference(logprobs(read_gguf_model(file)), base) < TOLERANCE
    container = adapted(model)
    trained = logprobs(model)
    assert difference(trained, base) > 1
    lora = write_gguf_lora(folder / "lora.gguf", container.adapter(), architecture)
    found = logprobs_by_llama_cpp(file, PROMPTS, VOCABULARY, lora=lora)
    assert difference(found, trained) < TOLERANCE
    return trained
