"""The sections on adapters of the page "LoRA Training Guide", on the embedded model.

The options have PEFT's names. The page computes on a GPU in float16, and the tests on the CPU in
float32. The page's numbers of parameters and bytes are wrong, so the tests count them.
"""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten

from tests.bases import trained
from textpolicy.adapters import (
    AdapterConfig,
    AdapterContainer,
    memory_stats,
    print_trainable_parameters,
    quantize,
)
from textpolicy.errors import AdapterError, ConfigError
from textpolicy.generation.lora import merge_weights
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.reload import reload_model, save_adapters
from textpolicy.planning import plan_adapters

PROMPT = mx.array([[5, 17, 3, 44, 60, 2]])
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]

# The page's own configuration, of its script.
LORA_CONFIG = {
    "r": 64,
    "lora_alpha": 128,
    "target_modules": ATTENTION,
    "lora_dropout": 0.05,
    "bias": "none",
    "task_type": "CAUSAL_LM",
}


@pytest.fixture
def model(load_tiny) -> nn.Module:
    return load_tiny()[0]


def loss(model: nn.Module, tokens: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")


def fine_tune(model: nn.Module, steps: int = 20, learning_rate: float = 1e-2) -> list[float]:
    optimizer = optim.Adam(learning_rate=learning_rate)
    losses: list[float] = []
    for _ in range(steps):
        value, gradient = nn.value_and_grad(model, loss)(model, PROMPT)
        optimizer.update(model, gradient)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(float(value))
    return losses


# How LoRA works


def test_base_weights_are_frozen_and_small_matrices_are_trained(model):
    before = tree_flatten(model.parameters(), destination={})
    container = AdapterContainer.from_model(model, AdapterConfig.from_dict(LORA_CONFIG))
    losses = fine_tune(model)
    assert losses[-1] < losses[0] / 2
    base = container.unload()
    assert all(before[n] is array for n, array in tree_flatten(base.parameters()))


def test_the_matrices_have_the_sizes_of_the_drawing(model):
    container = AdapterContainer.from_model(model, AdapterConfig.from_dict(LORA_CONFIG))
    layer = container.layers()["model.layers.0.self_attn.q_proj"]
    # d x r and r x d': rank 64 at both.
    assert layer.lora_a.shape == (192, 64) and layer.lora_b.shape == (64, 256)
    assert layer.scale == 128 / 64


# Training configuration


def test_the_recommended_settings_adapt_all_seven_projections(model):
    words = LORA_CONFIG | {"target_modules": ATTENTION + FEED_FORWARD}
    container = AdapterContainer.from_model(model, AdapterConfig.from_dict(words))
    names = {path.rpartition(".")[2] for path in container.layers()}
    assert names == {*ATTENTION, *FEED_FORWARD}
    assert len(container.layers()) == 7 * len(model.layers)
    assert container.config.dropout == 0.05


@pytest.mark.parametrize("rank", [8, 32, 64, 128])
def test_every_rank_of_the_page_can_be_tried(model, rank):
    words = LORA_CONFIG | {"r": rank, "lora_alpha": 2 * rank}
    before = model(PROMPT)
    container = AdapterContainer.from_model(model, AdapterConfig.from_dict(words))
    assert {layer.rank for layer in container.layers().values()} == {rank}
    assert {layer.scale for layer in container.layers().values()} == {2.0}
    assert mx.array_equal(model(PROMPT), before)


def test_memory_is_counted_before_and_after(model):
    config = AdapterConfig.from_dict(LORA_CONFIG)
    planned = plan_adapters(model, config)
    AdapterContainer.from_model(model, config)
    stats = memory_stats(model)
    assert stats["adapter_bytes"] == 4 * stats["trainable_parameters"]
    assert stats["trainable_parameters"] == planned.trainable_parameters
    assert (stats["base_bytes"], stats["adapter_bytes"]) == (
        planned.base_bytes,
        planned.adapter_bytes,
    )


# Implementation


def test_print_trainable_parameters_counts_what_is_there(model, capsys):
    AdapterContainer.from_model(model, AdapterConfig.from_dict(LORA_CONFIG))
    print_trainable_parameters(model)
    stats = memory_stats(model)
    # 64 for each input and output of q, k, v and o, in two blocks.
    expected = 2 * 64 * ((192 + 256) + 2 * (192 + 64) + (256 + 192))
    assert stats["trainable_parameters"] == expected
    printed = capsys.readouterr().out
    assert f"{expected:,}" in printed and f"{stats['total_parameters']:,}" in printed


def test_rank_64_on_the_page_s_model_has_more_parameters_than_the_page_prints():
    from textpolicy.planning.unloaded_model import build_unloaded_model

    # The config of Qwen2.5-14B. The page prints 4,194,304.
    qwen = {
        "model_type": "qwen2",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    }
    planned = plan_adapters(build_unloaded_model(qwen), AdapterConfig.from_dict(LORA_CONFIG))
    assert planned.trainable_parameters == 100_663_296


def test_words_that_peft_does_not_have_are_refused():
    with pytest.raises(ConfigError, match="lora_r"):
        AdapterConfig.from_peft(LORA_CONFIG | {"lora_r": 64})


def test_a_target_that_matches_nothing_is_an_error_that_names_the_nearest(model):
    words = LORA_CONFIG | {"target_modules": ["q_proj", "query_key_value"]}
    with pytest.raises(AdapterError, match="'query_key_value', which matches nothing; nearest"):
        AdapterContainer.from_model(model, AdapterConfig.from_dict(words))


# Merging adapters


@pytest.fixture
def checkpoint(tmp_path, model) -> tuple[Path, mx.array]:
    """Return the folder of a fine-tuned adapter in PEFT's layout, and the model's logits."""
    AdapterContainer.from_model(model, AdapterConfig.from_dict(LORA_CONFIG))
    fine_tune(model.train())
    folder = tmp_path / "hafs-coder-v1"
    save_adapters(model, folder, layout="peft")
    return folder, model.eval()(PROMPT)


@pytest.mark.slow
def test_load_base_and_adapters_then_merge_and_unload(checkpoint):
    folder, expected = checkpoint
    # Load base + adapters
    base_model, _tokenizer = load_model("tiny")
    adapters = AdapterContainer.from_directory(folder).load(base_model)
    assert mx.allclose(base_model(PROMPT), expected, atol=1e-5)

    # Merge
    merged_model = adapters.merge_and_unload()
    assert merged_model is base_model and AdapterContainer.of(merged_model) is None
    assert mx.allclose(merged_model(PROMPT), expected, atol=1e-3)
    assert type(merged_model.layers[0].self_attn.q_proj) is nn.Linear


@pytest.mark.slow
def test_merge_weights_is_the_same(checkpoint):
    folder, expected = checkpoint
    model, _tokenizer = reload_model("tiny", folder)
    assert mx.allclose(merge_weights(model)(PROMPT), expected, atol=1e-3)


@pytest.mark.slow
def test_or_adapters_are_used_directly(checkpoint):
    folder, expected = checkpoint
    model, _tokenizer = load_model("tiny", folder)
    assert mx.allclose(model(PROMPT), expected, atol=1e-5)


def test_the_files_are_those_that_peft_reads(checkpoint):
    folder, _expected = checkpoint
    assert sorted(file.name for file in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["bias"]) == (64, 128, "none")
    assert config["lora_dropout"] == 0.05 and config["task_type"] == "CAUSAL_LM"


# Common issues


def test_dropout_acts_while_training_and_not_when_serving(model):
    words = LORA_CONFIG | {"lora_dropout": 0.1}
    container = AdapterContainer.from_model(model, AdapterConfig.from_dict(words))
    container.swap(trained(container))
    model.train()
    assert not mx.array_equal(model(PROMPT), model(PROMPT))
    model.eval()
    assert mx.array_equal(model(PROMPT), model(PROMPT))


@pytest.mark.slow
def test_a_base_in_8_bits_is_trained_and_merged_to_float(model):
    # load_in_8bit and prepare_model_for_kbit_training in one.
    quantize(model, bits=8)
    container = AdapterContainer.from_model(model, AdapterConfig.from_dict(LORA_CONFIG))
    losses = fine_tune(model)
    assert losses[-1] < losses[0] / 2
    adapted = model.eval()(PROMPT)
    merged = container.merge_and_unload()
    assert type(merged.layers[0].self_attn.q_proj) is nn.Linear
    assert mx.allclose(merged(PROMPT), adapted, atol=1e-3)
