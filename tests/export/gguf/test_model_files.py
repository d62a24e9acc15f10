"""GGUF files of models: what is in them, what comes back, and what is refused."""

import json
import sys

import mlx.core as mx
import numpy as np
import pytest
from gguf import MODEL_ARCH, GGUFReader, get_tensor_name_map

from tests.export.gguf.models import YARN, adapted, difference, logprobs, make
from tests.export.gguf.tokenizers import tokenizer_with
from tests.tokenizers import make_tokenizer
from textpolicy.adapters import quantize
from textpolicy.adapters.files.gguf_layout import (
    FAMILIES,
    module_path,
    tensor_name,
    to_halves,
    to_pairs,
)
from textpolicy.errors import ConfigError, ModelError
from textpolicy.export.gguf import gguf_package, read_gguf_model, write_gguf


@pytest.fixture(scope="module")
def tokenizer(load_tiny):
    return load_tiny()[1]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_every_module_has_the_name_that_the_gguf_package_gives_it(family):
    names = get_tensor_name_map(MODEL_ARCH[family.name.upper()], 4)
    model, _ = make(family.model_class, tie_word_embeddings=False)
    paths = [path for path, module in model.named_modules() if "weight" in module]
    assert {f"model.layers.3.{inside}" for inside in ("self_attn.q_proj", "input_layernorm")} < {
        *paths
    }
    for path in paths:
        # Hugging Face has one module for each expert, and names the list of them.
        assert tensor_name(path) == names.get_name(path.replace("switch_mlp", "experts"))
        assert module_path(tensor_name(path)) == path


def test_rows_in_pairs_come_back_in_halves():
    rows = mx.arange(24).reshape(12, 2)
    assert to_pairs(rows, 2)[:, 0].tolist() == [0, 6, 2, 8, 4, 10, 12, 18, 14, 20, 16, 22]
    assert mx.array_equal(to_halves(to_pairs(rows, 2), 2), rows)


def test_the_file_holds_every_id_of_the_model_and_the_tokens_that_matter(
    load_tiny, tiny_architecture, tmp_path
):
    model, tokenizer = load_tiny()
    path = write_gguf(tmp_path / "tiny.gguf", model, tokenizer, tiny_architecture)
    values = {name: field.contents() for name, field in GGUFReader(path).fields.items()}
    tokens = values["tokenizer.ggml.tokens"]
    assert len(tokens) == len(set(tokens)) == 320
    ends = values["tokenizer.ggml.eos_token_id"], values["tokenizer.ggml.padding_token_id"]
    assert [tokens[end] for end in ends] == ["<|im_end|>", "<|endoftext|>"]
    assert values["tokenizer.chat_template"] == tokenizer.chat_template
    assert values["qwen3.attention.key_length"] == 64
    assert values["general.architecture"] == "qwen3"


def test_unused_ids_are_padded_and_an_answer_may_end_at_three_tokens(tmp_path):
    tokenizer = tokenizer_with("qwen2")
    used = len(tokenizer.get_vocab())
    for token in ("<|endoftext|>", "<|im_start|>"):
        tokenizer.add_eos_token(token)
    model, architecture = make("llama", vocab_size=used + 3)
    path = write_gguf(tmp_path / "a.gguf", model, tokenizer, architecture)
    values = {name: field.contents() for name, field in GGUFReader(path).fields.items()}
    assert values["tokenizer.ggml.tokens"][used:] == [f"[PAD{used + n}]" for n in range(3)]
    assert values["tokenizer.ggml.token_type"][used - 2 :] == [3, 4, 5, 5, 5]
    ends = [values[f"tokenizer.ggml.{kind}_token_id"] for kind in ("eos", "eot", "eom")]
    assert ends == [
        tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>", "<|im_start|>")
    ]


def test_a_quantized_model_is_written_as_the_floats_that_it_computes_with(tokenizer, tmp_path):
    model, architecture = make("llama")
    quantize(model, 4)
    path = write_gguf(tmp_path / "a.gguf", model, tokenizer, architecture)
    assert difference(logprobs(read_gguf_model(path)), logprobs(model)) < 1e-5


REFUSED_MODELS = {
    "sliding windows": (
        {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 8},
        "sliding_attention",
    ),
    "traditional positions": ({"rope_traditional": True}, "rope_traditional"),
    "dynamic scaling": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    "another yarn": (
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 16}},
        "beta_fast",
    ),
}


@pytest.mark.parametrize("case", REFUSED_MODELS)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(case, tokenizer, tmp_path):
    changes, message = REFUSED_MODELS[case]
    assert_refused(make("llama", **changes).model, tokenizer, tmp_path, message)


def test_models_without_a_family_and_models_with_adapters_are_refused(tokenizer, tmp_path):
    model, _ = make("olmo2")
    assert_refused(model, tokenizer, tmp_path, "olmo2; supported model types are mistral, llama")
    model, _ = make("llama")
    adapted(model)
    assert_refused(model, tokenizer, tmp_path, "Fuse them first")


def test_qwen_scaled_as_llama_3_and_other_layers_of_smollm3_are_refused(tokenizer, tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0}
    model, _ = make("qwen3", rope_scaling=scaling)
    assert_refused(model, tokenizer, tmp_path, "Llama 3")
    model, _ = make("smollm3", no_rope_layers=[1, 0, 1, 1])
    assert_refused(model, tokenizer, tmp_path, "no_rope_layers")


MIXTURES = {
    "norm_topk_prob": False,
    "mlp_only_layers": [0],
    "decoder_sparse_step": 2,
    "rope_scaling": YARN,
}


@pytest.mark.parametrize("option", MIXTURES)
def test_a_mixture_of_experts_that_llama_cpp_has_no_option_for_is_refused(
    option, tokenizer, tmp_path
):
    model, _ = make("qwen3_moe", **{option: MIXTURES[option]})
    assert_refused(model, tokenizer, tmp_path, f"its {option} is")


def test_a_bias_that_llama_cpp_does_not_add_is_refused(tokenizer, tmp_path):
    model, _ = make("qwen3")
    model.layers[0].mlp.up_proj.bias = mx.ones((128,))
    assert_refused(model, tokenizer, tmp_path, "mlp.up_proj: llama.cpp has no bias there")


def test_numbers_that_a_format_cannot_hold_are_refused(tokenizer, tmp_path):
    model, _ = make("llama", intermediate_size=72)
    assert_refused(model, tokenizer, tmp_path, "72 weights", number_format="q8_0")
    model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    assert_refused(model, tokenizer, tmp_path, "at most 65504", number_format="f16")
    model.layers[0].mlp.up_proj.weight[0, 0] = np.nan
    assert_refused(model, tokenizer, tmp_path, "NaN", number_format="f32")
    with pytest.raises(ConfigError, match="'q4_k'; expected one of f32, f16, bf16, q8_0"):
        write_gguf(tmp_path / "a.gguf", model, tokenizer, {}, number_format="q4_k")


REFUSED_TOKENIZERS = {
    "unigram": "Unigram; only byte-level BPE",
    "byte fallback": "byte_fallback is True",
    "wordpiece": "WordPiece",
    "stripping": r"'<\|im_start\|>' has the option lstrip",
    "llama3": "more than its bos and eos",
}


@pytest.mark.parametrize("kind", REFUSED_TOKENIZERS)
def test_a_tokenizer_that_llama_cpp_would_not_follow_is_refused(kind, tmp_path):
    model, _ = make("llama", vocab_size=700)
    assert_refused(model, make_tokenizer(kind), tmp_path, REFUSED_TOKENIZERS[kind])


def test_a_pre_tokenizer_without_a_name_is_refused_and_not_guessed(tmp_path):
    tokenizer = tokenizer_with("qwen2")
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    regex = definition["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    regex["Regex"] = regex["Regex"].replace(r"\p{N}|", r"\p{N}{1,2}|")
    changed = type(tokenizer.backend_tokenizer).from_str(json.dumps(definition))
    tokenizer._tokenizer._tokenizer = changed
    model, _ = make("llama", vocab_size=700)
    assert_refused(model, tokenizer, tmp_path, r"no name for the pre-tokenizer.*smollm, qwen2")


def test_a_chat_template_with_a_bos_that_the_tokenizer_lacks_is_refused(tmp_path):
    tokenizer = make_tokenizer("chatml")
    tokenizer._tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    model, _ = make("llama", vocab_size=700)
    assert_refused(model, tokenizer, tmp_path, "the chat template writes bos_token")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    model, _ = make("llama")
    assert_refused(model, tokenizer_with("qwen2"), tmp_path, "the model has 320 tokens")


def test_a_damaged_file_is_an_error_that_says_to_export_again(tokenizer, tmp_path):
    model, architecture = make("llama", num_hidden_layers=1)
    path = write_gguf(tmp_path / "a.gguf", model, tokenizer, architecture)
    content = path.read_bytes()
    for size in (0, 3, 30, 500, 5000, len(content) - 4000):
        path.write_bytes(content[:size])
        with pytest.raises(ModelError, match=r"a\.gguf.*Export the model again"):
            read_gguf_model(path)


def test_a_missing_package_is_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'textpolicy\[gguf\]'"):
        gguf_package.import_gguf()


def assert_refused(model, tokenizer, folder, message, **options):
    with pytest.raises(ModelError, match=f"(?s){message}"):
        write_gguf(folder / "a.gguf", model, tokenizer, {}, **options)
    assert list(folder.iterdir()) == []
