"""Adapters merged into weights: the forward pass stays, and a report says what rounding took."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import pytest

from tests.bases import BASES, arrays, bits, in_bfloat16, packed, trained
from tests.tiny import TOKENS, biased_model, expert_model, qwen3_model
from textpolicy.adapters import AdapterConfig, AdapterContainer, LoRARule, combine_adapters
from textpolicy.adapters.layers.adapter_layer import adapter_layers
from textpolicy.adapters.quantization.stored_weights import float_weight, format_of, is_quantized
from textpolicy.errors import AdapterError, ConfigError, ModelError
from textpolicy.generation.lora import merge_weights

EVERYTHING = ".*_proj|.*embed_tokens|lm_head"
# Where activations are in bfloat16, as mlx's nvfp4 tables make them, each is off by up to 1 in 256.
TOLERANCES = {"bfloat16": 0.1, "nvfp4": 0.1}


def adapted(
    make: Callable[[], nn.Module], *, kind: str = "lora", size: float = 0.1, path: str = EVERYTHING
) -> tuple[nn.Module, AdapterContainer]:
    model = make()
    rule = LoRARule(module_path=path, kind=kind, rank=4, scale=1.5)
    container = AdapterContainer.from_model(model, AdapterConfig(rules=[rule]))
    container.swap(trained(container, size=size))
    return model, container


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("base", BASES)
def test_merged_weights_compute_what_the_adapters_did(base, kind):
    """LoRA and DoRA on linear layers, the embedding table and the head, over every base."""
    model, container = adapted(BASES[base], kind=kind)
    forward = model(TOKENS)
    with container.disabled():
        moved = float(mx.abs(model(TOKENS) - forward).max())
    report = container.fuse(dtype=None if base == "bfloat16" else mx.float32)
    assert not adapter_layers(model) and len(report.modules) == 16
    assert not any(is_quantized(module) for module in model.modules())
    tolerance = TOLERANCES.get(base, 1e-4)
    assert float(mx.abs(model(TOKENS) - forward).max()) < tolerance < moved / 5


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (biased_model, ".*_proj"),
        (expert_model, ".*switch_mlp.*"),
        (lambda: qwen3_model(tie_word_embeddings=True), ".*embed_tokens"),
    ],
    ids=["biases", "experts", "tied table"],
)
def test_merging_keeps_biases_reaches_experts_and_tied_heads(make, path):
    model, container = adapted(make, path=path)
    forward = model(TOKENS)
    container.fuse()
    assert float(mx.abs(model(TOKENS) - forward).max()) < 1e-4


def test_an_offset_of_the_output_is_merged_into_the_bias():
    model = qwen3_model()
    rule = LoRARule(module_path=".*q_proj", bias=True, rank=2)
    container = AdapterContainer.from_model(model, AdapterConfig(rules=[rule]))
    container.swap(trained(container))
    forward = model(TOKENS)
    container.fuse()
    assert mx.allclose(model(TOKENS), forward, atol=1e-5)
    assert "bias" in model.layers[0].self_attn.q_proj


def test_merging_a_quantized_base_makes_float_what_was_adapted_and_nothing_else():
    model = packed(4, "nf4")()
    container = AdapterContainer.from_model(model, AdapterConfig(keys=["mlp.up_proj"]))
    container.swap(trained(container))
    before = arrays(model)
    container.fuse()
    assert type(model.layers[0].mlp.up_proj) is nn.Linear
    assert model.layers[0].mlp.down_proj.mode == "nf4"
    after = arrays(model)
    kept = {name for name in after if "up_proj" not in name}
    assert kept and all(after[name] is before[name] for name in kept)


def test_arithmetic_is_float32_whatever_the_weights_are_in():
    model, container = adapted(in_bfloat16, path=".*q_proj", size=0.02)
    layer = model.layers[0].self_attn.q_proj
    expected = float_weight(layer.base) + layer.delta()
    container.fuse(dtype=mx.float32)
    assert mx.array_equal(model.layers[0].self_attn.q_proj.weight, expected)


def test_merged_dora_rows_have_the_lengths_that_were_trained():
    model, container = adapted(packed(3), kind="dora", path=".*q_proj")
    m = model.layers[0].self_attn.q_proj.m
    container.fuse(dtype=mx.float32)
    weight = model.layers[0].self_attn.q_proj.weight
    assert mx.allclose(mx.linalg.norm(weight, axis=1), mx.abs(m), rtol=1e-5)


# What survives


@pytest.mark.parametrize("qtype", ["same", "int8", "nf4"])
def test_quantizing_again_happens_when_asked_for_and_is_measured(qtype):
    model, container = adapted(packed(4), path=".*q_proj", size=1.0)
    layer = model.layers[0].self_attn.q_proj
    base, delta = float_weight(layer.base), layer.delta()
    report = container.fuse(qtype=qtype)
    fused = model.layers[0].self_attn.q_proj
    form = format_of(fused)
    assert form.name == {"same": "int4"}.get(qtype, qtype)
    assert {module.dtype for module in report.modules} == {form.name}
    assert not fused.trainable_parameters()
    kept = ((float_weight(fused) - base) * delta).sum() / mx.square(delta).sum()
    found = {module.path: module.survival for module in report.modules}
    assert found["model.layers.0.self_attn.q_proj"] == pytest.approx(float(kept), abs=1e-4)
    noise = {module.path: module.noise for module in report.modules}
    changed = mx.linalg.norm(float_weight(fused) - base - delta) / mx.linalg.norm(delta)
    assert noise["model.layers.0.self_attn.q_proj"] == pytest.approx(float(changed), abs=1e-4)
    assert min(noise.values()) <= report.noise <= max(noise.values())


def test_float_modules_stay_float_when_the_same_format_is_asked_for():
    model, container = adapted(qwen3_model, path=".*q_proj")
    container.fuse(qtype="same")
    assert type(model.layers[0].self_attn.q_proj) is nn.Linear


@pytest.mark.parametrize(
    ("make", "options", "size"),
    [(packed(4), {"qtype": "same"}, 0.01), (in_bfloat16, {}, 0.0003)],
    ids=["quantized again", "bfloat16"],
)
def test_a_merge_that_would_lose_the_training_is_refused_and_changes_nothing(make, options, size):
    model, container = adapted(make, path=".*_proj", size=size)
    before, forward = arrays(model), model(TOKENS)
    with pytest.raises(AdapterError) as caught:
        container.fuse(**options)
    message = str(caught.value)
    assert "Fusing would keep" in message and "of an update of relative size" in message
    assert "Expected at least 90%. Nothing was changed" in message
    assert AdapterContainer.of(model) is container
    after = arrays(model)
    assert after.keys() == before.keys()
    assert all(after[name] is array for name, array in before.items())
    assert mx.array_equal(bits(model(TOKENS)), bits(forward))
    report = container.fuse(**options, min_survival=0)
    assert report.survival < 0.9


def test_a_report_can_be_had_without_merging():
    model, container = adapted(packed(4), path=".*q_proj")
    again = container.fuse_report(qtype="same")
    kept = container.fuse_report()
    assert AdapterContainer.of(model) is container
    assert again.survival < kept.survival == pytest.approx(1, abs=1e-3)
    assert container.fuse(qtype="same", min_survival=0) == again


def test_a_format_that_does_not_fit_is_refused_by_the_name_of_the_module():
    _model, container = adapted(lambda: qwen3_model(hidden_size=32), path=".*q_proj")
    with pytest.raises(ModelError, match=r"q_proj cannot be quantized to int4: rows of 32"):
        container.fuse(qtype="int4")
    with pytest.raises(ConfigError, match="weight_qtype is 'int7'"):
        container.fuse(qtype="int7")


def test_numbers_that_are_not_finite_are_not_merged():
    model, container = adapted(qwen3_model, path=".*q_proj")
    layer = model.layers[1].self_attn.q_proj
    layer.lora_b = layer.lora_b * mx.nan
    with pytest.raises(AdapterError, match=r"layers\.1\.self_attn\.q_proj\.lora_b: not finite"):
        container.fuse()


# By other names


def test_merge_and_unload_gives_the_plain_model():
    model, container = adapted(qwen3_model)
    forward = model(TOKENS)
    assert container.merge_and_unload() is model
    assert AdapterContainer.of(model) is None
    assert mx.allclose(model(TOKENS), forward, atol=1e-4)


def test_merge_weights_refuses_what_would_be_lost_and_takes_another_dtype():
    model, _container = adapted(in_bfloat16, size=0.0003, path=".*_proj")
    with pytest.raises(AdapterError, match="Fusing would keep"):
        merge_weights(model)
    assert merge_weights(model, dtype=mx.float32) is model
    assert model.layers[0].mlp.up_proj.weight.dtype == mx.float32


def test_the_active_adapter_is_merged_and_the_others_stay_in_the_container():
    model, container = adapted(qwen3_model, path=".*q_proj")
    container.add("half", combine_adapters(container, {"default": 0.5}))
    container.activate("half")
    half = model(TOKENS)
    container.fuse()
    assert mx.allclose(model(TOKENS), half, atol=1e-5)
    assert container.names == ("half", "default") and container.name == "half"


def test_merged_adapters_cannot_be_put_on_the_merged_model():
    model, container = adapted(qwen3_model, path=".*q_proj")
    container.fuse()
    with pytest.raises(AdapterError, match="base fingerprint"):
        container.load(model)
    other = qwen3_model()
    assert container.load(other).version == 1
