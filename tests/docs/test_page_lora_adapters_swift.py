"""The page "LoRA Adapters" of mlx-swift-lm from top to bottom, in Python on the embedded model.

LoRAConfiguration is `AdapterConfig`, LoRAContainer is `AdapterContainer`; files and their fields
keep their names.
"""

import json

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from tests.bases import arrays, trained
from textpolicy.adapters import AdapterConfig, AdapterContainer, quantize
from textpolicy.adapters.layers.dora import DoRALinear
from textpolicy.adapters.layers.lora import LoRALinear
from textpolicy.errors import AdapterError, ConfigError
from textpolicy.planning import plan_adapters

PROMPT = mx.array([[5, 17, 3, 44, 60, 2]])
LINEARS = {
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
}


@pytest.fixture
def model(load_tiny):
    return load_tiny()[0]


def trained_file(load_tiny, path, seed=1, **words):
    """An adapter file that changes what the model says."""
    other, _ = load_tiny()
    container = AdapterContainer.from_model(other, AdapterConfig(rank=8, **words))
    container.swap(trained(container, seed))
    container.publish(path)
    return other(PROMPT)


# LoRAConfiguration


def test_creating_a_configuration(model):
    # Basic LoRA
    config = AdapterConfig(num_layers=2, rank=8, scale=10.0)
    assert config.rules[0].kind == "lora"
    container = AdapterContainer.from_model(model, config)
    assert {layer.rank for layer in container.layers().values()} == {8}
    assert {layer.scale for layer in container.layers().values()} == {10.0}
    container.unload()

    # DoRA with custom keys
    keys = ["self_attn.q_proj", "self_attn.v_proj"]
    config = AdapterConfig(num_layers=2, kind="dora", rank=16, scale=20.0, keys=keys)
    container = AdapterContainer.from_model(model, config)
    assert {path.split(".", 3)[3] for path in container.layers()} == set(keys)
    assert {layer.kind for layer in container.layers().values()} == {"dora"}


def test_the_form_of_adapter_config_json():
    written = """{
      "fine_tune_type": "lora",
      "num_layers": 28,
      "lora_parameters": {
        "rank": 16,
        "scale": 20.0,
        "keys": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
      }
    }"""
    config = AdapterConfig.from_dict(json.loads(written))
    keys = [f"self_attn.{name}_proj" for name in "qkv"]
    assert config == AdapterConfig(num_layers=28, rank=16, scale=20.0, keys=keys)
    again = config.to_dict()
    assert again["fine_tune_type"] == "lora" and again["num_layers"] == 28
    assert again["lora_parameters"] == {"rank": 16, "scale": 20.0, "dropout": 0.0, "keys": keys}


def test_a_model_that_is_shallower_than_the_configuration_has_all_its_blocks_adapted(model):
    written = {"fine_tune_type": "lora", "num_layers": 28, "lora_parameters": {"rank": 4}}
    with pytest.warns(UserWarning, match="num_layers is 28, and the model has 2 blocks: all 2"):
        container = AdapterContainer.from_model(model, AdapterConfig.from_dict(written))
    assert {path.split(".")[2] for path in container.layers()} == {"0", "1"}
    with pytest.raises(ConfigError, match="num_layers is 0"):
        AdapterConfig(num_layers=0)


def test_a_file_without_rank_and_scale_has_the_defaults_of_the_page():
    config = AdapterConfig.from_dict({"fine_tune_type": "lora", "num_layers": 2})
    assert config == AdapterConfig(num_layers=2, rank=8, scale=10.0)
    given = {"fine_tune_type": "dora", "num_layers": 2, "lora_parameters": {"rank": 16}}
    assert AdapterConfig.from_dict(given).rules[0].scale == 10.0


# Loading and applying


def test_from_model_is_ready_for_training(model):
    container = AdapterContainer.from_model(model, AdapterConfig(num_layers=2, rank=8))
    trainable = tree_flatten(model.trainable_parameters(), destination={})
    # Container's parameters are the trainable weights.
    assert trainable.keys() == container.parameters().keys()
    assert all(name.rpartition(".")[2] in ("lora_a", "lora_b") for name in trainable)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_applying_an_adapter_of_a_file(model, load_tiny, tmp_path, kind):
    # A file, or a directory with adapter_config.json and adapters.safetensors.
    expected = trained_file(load_tiny, tmp_path / "a.safetensors", kind=kind)
    before = model(PROMPT)
    AdapterContainer.from_directory(tmp_path / "a.safetensors").load(model)
    assert mx.array_equal(model(PROMPT), expected)
    assert not mx.array_equal(before, expected)


def test_a_directory_as_the_page_has_it(model, tmp_path):
    container = AdapterContainer.from_model(model, AdapterConfig(num_layers=2, rank=4))
    container.swap(trained(container))
    expected = model(PROMPT)
    container.save(tmp_path / "adapter", layout="mlx")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapters.safetensors",
    }
    container.unload()
    AdapterContainer.from_directory(tmp_path / "adapter").load(model)
    assert mx.array_equal(model(PROMPT), expected)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_fusing_leaves_plain_layers_with_the_adapter_baked_in(model, load_tiny, tmp_path, kind):
    expected = trained_file(load_tiny, tmp_path / "a.safetensors", kind=kind)
    report = AdapterContainer.from_directory(tmp_path / "a.safetensors").load(model).fuse()
    assert report.survival == pytest.approx(1, abs=1e-3)
    assert type(model.layers[0].self_attn.q_proj) is nn.Linear
    assert mx.allclose(model(PROMPT), expected, atol=1e-3)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_unloading_restores_the_original_layers(model, load_tiny, tmp_path, kind):
    before, modules = arrays(model), dict(model.named_modules())
    trained_file(load_tiny, tmp_path / "a.safetensors", kind=kind)
    AdapterContainer.from_directory(tmp_path / "a.safetensors").load(model).unload()
    assert all(array is before[name] for name, array in arrays(model).items())
    assert all(module is modules[path] for path, module in model.named_modules())


# Layer types


def test_the_four_layer_types_compute_what_the_page_says(load_tiny):
    x = mx.random.normal((3, 192))
    for quantized in (False, True):
        for kind, layer_type in (("lora", LoRALinear), ("dora", DoRALinear)):
            model, _ = load_tiny()
            if quantized:
                quantize(model)
            base = model.layers[0].self_attn.q_proj
            container = AdapterContainer.from_model(model, AdapterConfig(kind=kind, rank=4))
            layer = model.layers[0].self_attn.q_proj
            assert type(layer) is layer_type and layer.base is base
            names = {"lora_a", "lora_b"} | ({"m"} if kind == "dora" else set())
            assert set(layer.trainable) == names
            # A fresh one is the base.
            assert mx.array_equal(layer(x), base(x))
            container.swap(trained(container))
            # Forward: y = Wx + scale * (x @ A @ B), and for DoRA the rows' lengths are m.
            if kind == "lora":
                expected = base(x) + layer.scale * (x @ layer.lora_a @ layer.lora_b)
            else:
                lengths = mx.linalg.norm(layer.merged_weight(), axis=1)
                assert mx.allclose(lengths, mx.abs(layer.m), rtol=1e-4)
                expected = x @ layer.merged_weight().T
            assert mx.allclose(layer(x), expected, atol=1e-3)


# LoRAModel: the default keys


def test_by_default_every_linear_layer_of_the_blocks_is_adapted(model):
    container = AdapterContainer.from_model(model, AdapterConfig())
    paths = [path.split(".", 3) for path in container.layers()]
    assert {block for _, _, block, _ in paths} == {str(i) for i in range(len(model.layers))}
    assert {key for *_, key in paths} == LINEARS


def test_keys_that_match_nothing_are_an_error(model):
    # Swift adapts nothing and trains nothing.
    with pytest.raises(
        AdapterError, match=r"'q_proj' matches nothing; nearest: .'self_attn.q_proj'"
    ):
        AdapterContainer.from_model(model, AdapterConfig(keys=["q_proj"]))


# LoRALayer


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_layer_can_be_merged_and_reverted(model, kind):
    base = model.layers[0].mlp.up_proj
    container = AdapterContainer.from_model(model, AdapterConfig(kind=kind, rank=4))
    container.swap(trained(container))
    layer = model.layers[0].mlp.up_proj
    x = mx.random.normal((3, 192))
    fused, reverted = layer.fused(), layer.reverted()
    assert type(fused) is nn.Linear and reverted is base
    assert mx.allclose(fused(x), layer(x), atol=1e-3)
    assert mx.array_equal(reverted(x), base(x))
    assert not mx.allclose(fused(x), base(x), atol=1e-2)
    # Neither changes the model.
    assert model.layers[0].mlp.up_proj is layer


def test_a_fused_layer_of_a_quantized_base_is_float(model):
    quantize(model)
    container = AdapterContainer.from_model(model, AdapterConfig(rank=4))
    container.swap(trained(container))
    layer = model.layers[0].mlp.up_proj
    x = mx.random.normal((3, 192))
    fused = layer.fused(mx.float32)
    assert type(fused) is nn.Linear and fused.weight.dtype == mx.float32
    assert mx.allclose(fused(x), layer(x), atol=1e-3)
    assert isinstance(layer.reverted(), nn.QuantizedLinear)


# Usage examples


def test_hot_swapping_adapters_of_different_shape(model, load_tiny, tmp_path):
    first = trained_file(load_tiny, tmp_path / "1.safetensors", 1)
    second = trained_file(
        load_tiny, tmp_path / "2.safetensors", 2, kind="dora", keys=["mlp.up_proj"]
    )
    before = model(PROMPT)
    adapter1 = AdapterContainer.from_directory(tmp_path / "1.safetensors").load(model)
    assert mx.array_equal(model(PROMPT), first)
    adapter1.unload()
    assert mx.array_equal(model(PROMPT), before)
    # Nothing of the first is left behind by the second, whose keys are others.
    adapter2 = AdapterContainer.from_directory(tmp_path / "2.safetensors").load(model)
    assert mx.array_equal(model(PROMPT), second)
    adapter2.unload()
    assert mx.array_equal(model(PROMPT), before)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"kind": "dora"}, "the same layers in another kind"),
        ({"keys": ["mlp.up_proj"]}, r"other layers, such as model\.layers\.0\.mlp\.down_proj"),
    ],
)
def test_a_swap_to_other_layers_says_what_to_call(model, load_tiny, tmp_path, words, message):
    trained_file(load_tiny, tmp_path / "a.safetensors", **words)
    container = AdapterContainer.from_model(model, AdapterConfig(rank=8))
    container.swap(trained(container))
    before = model(PROMPT)
    with pytest.raises(AdapterError, match=rf"{message}.*Call unload\(\) and then .*activate"):
        container.swap(tmp_path / "a.safetensors")
    assert mx.array_equal(model(PROMPT), before)


def test_an_adapter_can_be_off_for_a_while(model):
    before = model(PROMPT)
    container = AdapterContainer.from_model(model, AdapterConfig(kind="dora"))
    container.swap(trained(container))
    with container.disabled():
        assert mx.array_equal(model(PROMPT), before)
    assert not mx.array_equal(model(PROMPT), before)


# Memory considerations


def test_the_memory_of_an_adapter_is_two_small_matrices_a_layer(model):
    planned = plan_adapters(model, AdapterConfig(rank=8))
    for row in planned.modules:
        outputs, inputs = row.shape
        assert row.adapter_bytes == (0 if row.kind == "none" else 4 * 8 * (inputs + outputs))
    quantize(model)
    assert plan_adapters(model, AdapterConfig(rank=8)).adapter_bytes == planned.adapter_bytes


def test_rank_8_on_7_billion_parameters_takes_as_much_as_the_page_says():
    from textpolicy.planning.unloaded_model import build_unloaded_model

    llama = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
        "vocab_size": 32000,
    }
    keys = ["self_attn.q_proj", "self_attn.v_proj"]
    planned = plan_adapters(build_unloaded_model(llama), AdapterConfig(rank=8, keys=keys))
    # "~10-20MB", of queries and values.
    assert 10e6 < planned.adapter_bytes < 20e6


# Saving


def test_saved_weights_are_the_trainable_ones_and_nothing_else(model, tmp_path):
    container = AdapterContainer.from_model(model, AdapterConfig(rank=8))
    container.publish(tmp_path / "adapters.safetensors")
    saved = mx.load(str(tmp_path / "adapters.safetensors"))
    trainable = tree_flatten(model.trainable_parameters(), destination={})
    assert saved.keys() == trainable.keys()
    assert all(mx.array_equal(array, trainable[name]) for name, array in saved.items())
