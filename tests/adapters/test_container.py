"""Adapters: the identity when fresh, exact to take off, safe to swap, and alone in training."""

import copy
import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from tests.bases import BASES as FORMATS
from tests.tiny import TOKENS, biased_model, expert_model, qwen3_model
from textpolicy.adapters import (
    AdapterConfig,
    AdapterContainer,
    LoRARule,
    adapted_copy,
    combine_adapters,
    inspect_adapter,
    memory_stats,
    quantize,
    shared_copy,
)
from textpolicy.adapters.files.adapter_file import write_adapter_file
from textpolicy.adapters.layers.adapter_layer import adapter_layers, base_parameters
from textpolicy.adapters.quantization.stored_weights import float_weight, is_quantized
from textpolicy.errors import AdapterError, ConfigError
from textpolicy.generation.lora import (
    apply_lora,
    compute_lora_memory_savings,
    create_lora_setup,
    create_qlora_setup,
    extract_params,
    freeze_base,
    merge_weights,
)

CONFIG = AdapterConfig(rank=4, scale=2.0)


def in_bfloat16() -> nn.Module:
    model = qwen3_model()
    model.set_dtype(mx.bfloat16)
    return model


def in_4_bits() -> nn.Module:
    model = qwen3_model()
    quantize(model)
    return model


def in_4_bits_over_bfloat16() -> nn.Module:
    model = in_bfloat16()
    quantize(model)
    return model


BASES = [qwen3_model, biased_model, in_bfloat16, in_4_bits, in_4_bits_over_bfloat16]


def arrays(model: nn.Module) -> dict[str, mx.array]:
    return tree_flatten(model.parameters(), destination={})


def adapt(
    make: Callable[[], nn.Module] = qwen3_model, config: AdapterConfig = CONFIG
) -> tuple[nn.Module, AdapterContainer]:
    model = make()
    return model, AdapterContainer.from_model(model, config)


def bits(logits: mx.array) -> mx.array:
    return logits.view(mx.uint16 if logits.dtype == mx.bfloat16 else mx.uint32)


def trained(container: AdapterContainer, seed: int = 1, size: float = 0.1) -> dict[str, mx.array]:
    """Adapter tensors that change what the model computes."""
    keys = mx.random.split(mx.random.key(seed), len(container.parameters()))
    return {
        name: mx.random.normal(array.shape, key=key) * size
        for (name, array), key in zip(container.parameters().items(), keys, strict=True)
    }


def random_state() -> list[list[int]]:
    return [array.tolist() for array in mx.random.state]


def loss(model: nn.Module, tokens: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")


def train(model: nn.Module, steps: int = 2) -> None:
    optimizer = optim.Adam(learning_rate=1e-2)
    for _ in range(steps):
        _, gradient = nn.value_and_grad(model, loss)(model, TOKENS)
        optimizer.update(model, gradient)
        mx.eval(model.parameters(), optimizer.state)


# Identity


@pytest.mark.parametrize("make", BASES)
def test_a_fresh_adapter_is_the_base_bit_for_bit(make):
    model = make()
    before = model(TOKENS)
    AdapterContainer.from_model(model, CONFIG)
    assert len(adapter_layers(model)) == 14
    after = model(TOKENS)
    assert after.dtype == before.dtype
    assert mx.array_equal(bits(before), bits(after))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("base", [*FORMATS, "biased"])
def test_load_then_unload_restores_the_very_modules_and_arrays(base, kind):
    model = biased_model() if base == "biased" else FORMATS[base]()
    arrays_before, modules_before = arrays(model), dict(model.named_modules())
    trainable_before = tree_flatten(model.trainable_parameters(), destination={})
    rule = LoRARule(module_path=".*_proj|.*embed_tokens", kind=kind, rank=4)
    container = AdapterContainer.from_model(model, AdapterConfig(rules=[rule]))
    container.swap(trained(container))
    assert container.unload() is model
    assert AdapterContainer.of(model) is None
    modules, after = dict(model.named_modules()), arrays(model)
    assert modules.keys() == modules_before.keys() and after.keys() == arrays_before.keys()
    assert all(module is modules_before[path] for path, module in modules.items())
    assert all(array is arrays_before[name] for name, array in after.items())
    trainable = tree_flatten(model.trainable_parameters(), destination={})
    assert trainable.keys() == trainable_before.keys()


@pytest.mark.parametrize("make", BASES)
def test_disabled_adapters_are_the_base_exactly_and_come_back(make):
    model = make()
    base = model(TOKENS)
    container = AdapterContainer.from_model(model, CONFIG)
    container.swap(trained(container))
    adapted = model(TOKENS)
    with container.disabled():
        with container.disabled():
            assert mx.array_equal(model(TOKENS), base)
        assert mx.array_equal(model(TOKENS), base)
    assert mx.array_equal(model(TOKENS), adapted)
    assert not mx.array_equal(adapted, base)


def test_adapters_come_back_when_the_disabled_block_raises():
    model, container = adapt()
    container.swap(trained(container))
    adapted = model(TOKENS)
    with pytest.raises(ZeroDivisionError), container.disabled():
        _ = 1 / 0
    assert mx.array_equal(model(TOKENS), adapted)


# The layer


def test_the_update_is_scale_times_the_low_rank_product():
    model = qwen3_model()
    linear = model.layers[0].mlp.up_proj
    container = AdapterContainer.from_model(model, AdapterConfig(rank=3, scale=0.5))
    container.swap(trained(container))
    layer = model.layers[0].mlp.up_proj
    x = mx.random.normal((2, 5, 64))
    expected = linear(x) + 0.5 * (x @ layer.lora_a @ layer.lora_b)
    assert mx.allclose(layer(x), expected, atol=1e-6)
    assert layer.lora_a.shape == (64, 3) and layer.lora_b.shape == (3, 128)


def test_lora_a_is_uniform_within_one_over_the_root_of_the_inputs():
    model = qwen3_model()
    AdapterContainer.from_model(model, AdapterConfig(rank=64))
    a = model.layers[0].mlp.down_proj.lora_a
    bound = 1 / math.sqrt(128)
    assert float(mx.abs(a).max()) <= bound
    # The standard deviation of a uniform distribution is its half width over the root of 3.
    assert float(a.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert abs(float(a.mean())) < bound / 20


def test_adapters_are_drawn_from_their_seed_and_not_from_global_state():
    def fresh(seed: int) -> mx.array:
        model = qwen3_model()
        state = random_state()
        AdapterContainer.from_model(model, CONFIG, seed=seed)
        assert random_state() == state
        return model.layers[1].self_attn.q_proj.lora_a

    first = fresh(7)
    assert mx.array_equal(fresh(7), first)
    assert not mx.array_equal(fresh(8), first)


def test_two_layers_of_one_shape_begin_differently():
    model, _ = adapt()
    assert not mx.array_equal(
        model.layers[0].self_attn.q_proj.lora_a, model.layers[1].self_attn.q_proj.lora_a
    )


@pytest.mark.parametrize("make", BASES)
def test_adapters_are_float32_over_any_base(make):
    _model, container = adapt(make)
    assert {array.dtype for array in container.parameters().values()} == {mx.float32}


def test_adapters_cast_to_fewer_bits_are_refused_at_the_next_update(tmp_path):
    model, container = adapt()
    model.set_dtype(mx.bfloat16)
    with pytest.raises(AdapterError, match="expected float32"):
        container.advance()
    with pytest.raises(AdapterError, match="expected float32"):
        container.publish(tmp_path / "a.safetensors")


def test_dropout_acts_in_training_only():
    model = qwen3_model()
    container = AdapterContainer.from_model(model, AdapterConfig(rank=4, dropout=0.5))
    container.swap(trained(container))
    model.eval()
    assert mx.array_equal(model(TOKENS), model(TOKENS))
    model.train()
    assert not mx.array_equal(model(TOKENS), model(TOKENS))


# Training


@pytest.mark.parametrize("make", BASES)
def test_only_adapters_get_gradients_and_only_adapters_move(make):
    model = make()
    base = arrays(model)
    container = AdapterContainer.from_model(model, CONFIG)
    _, gradient = nn.value_and_grad(model, loss)(model, TOKENS)
    assert tree_flatten(gradient, destination={}).keys() == container.parameters().keys()
    before = container.parameters()
    train(model)
    moved = {n for n, array in container.parameters().items() if not mx.all(array == before[n])}
    assert moved == before.keys()
    after = arrays(container.unload())
    assert all(after[name] is array for name, array in base.items())


def test_a_bias_of_a_quantized_module_is_not_trained():
    model = biased_model()
    quantize(model)
    assert not tree_flatten(model.layers[0].self_attn.trainable_parameters())


def test_freeze_base_freezes_again_what_somebody_unfroze():
    model, container = adapt()
    model.unfreeze()
    assert freeze_base(model) is model
    trainable = tree_flatten(model.trainable_parameters(), destination={})
    assert trainable.keys() == container.parameters().keys()


def test_versions_count_updates():
    _model, container = adapt()
    assert container.version == 0
    assert container.advance() == 1 and container.version == 1


# Swap


def test_swapping_a_b_a_equals_a():
    model, container = adapt()
    a, b = trained(container, 1), trained(container, 2)
    container.swap(a)
    with_a = model(TOKENS)
    container.swap(b)
    assert not mx.array_equal(model(TOKENS), with_a)
    assert container.swap(a, version=9) == 9 == container.version
    assert mx.array_equal(bits(model(TOKENS)), bits(with_a))


def test_swapping_tensors_makes_a_new_version():
    _model, container = adapt()
    assert [container.swap(trained(container)) for _ in range(2)] == [1, 2]


@pytest.mark.parametrize("make", [qwen3_model, in_4_bits])
def test_a_compiled_function_sees_swap_gate_and_scale(make):
    model, container = adapt(make)
    compiled = mx.compile(model, inputs=[model.state])
    base = compiled(TOKENS)
    container.swap(trained(container))
    swapped = compiled(TOKENS)
    assert float(mx.abs(swapped - base).max()) > 0.01
    assert mx.allclose(swapped, model(TOKENS), atol=1e-5)
    with container.disabled():
        assert mx.allclose(compiled(TOKENS), base, atol=1e-5)
    for layer in adapter_layers(model).values():
        layer.set_scale(0.0)
    assert mx.allclose(compiled(TOKENS), base, atol=1e-5)


def test_a_swap_that_does_not_fit_says_everything_at_once_and_changes_nothing():
    _model, container = adapt()
    given = trained(container)
    names = sorted(given)
    del given[names[0]]
    given[names[1]] = given[names[1]][:, :2]
    given[names[2]] = given[names[2]] * mx.nan
    given[names[3]] = given[names[3]].astype(mx.int32)
    given["model.layers.9.mlp.up_proj.lora_a"] = mx.zeros((2, 2))
    before = container.parameters()
    with pytest.raises(AdapterError) as caught:
        container.swap(given)
    message = str(caught.value)
    for words in [
        f"{names[0]}: missing",
        f"{names[1]}: shape",
        f"{names[2]}: not finite",
        f"{names[3]}: mlx.core.int32, expected floating point",
        "model.layers.9.mlp.up_proj.lora_a: no such adapter",
    ]:
        assert words in message
    assert container.version == 0
    assert all(array is before[name] for name, array in container.parameters().items())


def test_a_long_list_of_problems_is_counted():
    _model, container = adapt()
    with pytest.raises(AdapterError, match="and 20 more like the last line"):
        container.swap({})


# Shared copies


@pytest.mark.parametrize("make", BASES)
def test_a_shared_copy_shares_every_array_and_computes_the_same(make):
    model, container = adapt(make)
    container.swap(trained(container), version=3)
    other = shared_copy(model)
    mine, own = arrays(model), AdapterContainer.of(other)
    assert own is not container and AdapterContainer.of(model) is container
    assert own.version == 3 and own.publish_path is None and own.config == container.config
    assert arrays(other).keys() == mine.keys()
    assert all(array is mine[name] for name, array in arrays(other).items())
    assert mx.array_equal(bits(model(TOKENS)), bits(other(TOKENS)))


def test_a_shared_copy_keeps_frozen_and_training_flags_and_then_has_its_own():
    model, _ = adapt()
    model.train()
    other = shared_copy(model)
    trainable = tree_flatten(model.trainable_parameters(), destination={}).keys()
    assert tree_flatten(other.trainable_parameters(), destination={}).keys() == trainable
    other.eval()
    other.freeze()
    assert all(module.training for module in model.modules())
    assert tree_flatten(model.trainable_parameters(), destination={}).keys() == trainable


@pytest.mark.parametrize("make", [qwen3_model, in_4_bits])
def test_training_swapping_and_unloading_one_shared_copy_never_touches_the_other(make):
    model, container = adapt(make)
    other = shared_copy(model)
    before, logits = arrays(other), other(TOKENS)
    train(model)
    with container.disabled():
        assert mx.array_equal(other(TOKENS), logits)
    container.swap(trained(container))
    container.unload()
    after = arrays(other)
    assert all(array is before[name] for name, array in after.items())
    assert mx.array_equal(other(TOKENS), logits)
    own = AdapterContainer.of(other)
    own.swap(trained(own, 2))
    own.fuse()
    assert not adapter_layers(model) and not adapter_layers(other)
    assert AdapterContainer.from_model(model, CONFIG).version == 0


def memory_in_use() -> int:
    """Return the bytes that arrays take, without those that only wait for the collector.

    An array that mlx makes next takes no larger memory that an earlier array has left.
    """
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()


def test_a_shared_copy_takes_no_memory_until_its_adapters_differ():
    model = qwen3_model(hidden_size=512, vocab_size=2048)
    container = AdapterContainer.from_model(model, CONFIG)
    start = memory_in_use()
    other = shared_copy(model)
    mx.eval(other.parameters())
    assert memory_in_use() == start
    own = AdapterContainer.of(other)
    own.swap(trained(container))
    stats = memory_stats(model)
    grown = memory_in_use() - start
    assert stats["adapter_bytes"] <= grown < 1.2 * stats["adapter_bytes"]
    assert stats["adapter_bytes"] < stats["base_bytes"] / 20


@pytest.mark.parametrize("make", [qwen3_model, in_4_bits])
def test_adapted_copies_of_one_base_share_its_arrays_and_have_their_own_adapters(make, tmp_path):
    plain = make()(TOKENS)
    model, container = adapt(make)
    container.swap(trained(container))
    own = model(TOKENS)
    wide, wider = adapt(make, AdapterConfig(rank=8, num_layers=1))
    wider.swap(trained(wider))
    wider.publish(tmp_path / "wider.safetensors")
    base, other = adapted_copy(model, None), adapted_copy(model, tmp_path / "wider.safetensors")
    assert mx.array_equal(base(TOKENS), plain)
    assert mx.array_equal(other(TOKENS), wide(TOKENS))
    assert mx.array_equal(model(TOKENS), own)
    assert AdapterContainer.of(base) is None and AdapterContainer.of(model) is container
    shared = base_parameters(model)
    assert all(array is shared[name] for name, array in base_parameters(other).items())


def test_a_shared_copy_of_an_unadapted_model_has_no_adapters():
    model = qwen3_model()
    other = shared_copy(model)
    AdapterContainer.from_model(other, CONFIG)
    assert AdapterContainer.of(model) is None
    assert AdapterContainer.of(other) is not None


def test_a_module_that_occurs_twice_occurs_twice_in_the_shared_copy():
    model = qwen3_model()
    model.layers[1].self_attn = model.layers[0].self_attn
    other = shared_copy(model)
    assert other.layers[1].self_attn is other.layers[0].self_attn
    assert other.layers[0].self_attn is not model.layers[0].self_attn


def test_the_adapters_of_a_deep_copy_are_refused():
    model, _ = adapt()
    with pytest.raises(AdapterError, match=r"shared_copy\(model\)"):
        AdapterContainer.of(copy.deepcopy(model))


def test_a_dropped_model_is_freed_at_once():
    model, container = adapt(config=AdapterConfig(rank=4, kind="dora"))
    container.add("other", container.adapter())
    container.activate("other")
    gone = [weakref.ref(model), weakref.ref(model.layers[0].mlp.up_proj.base)]
    gc.disable()
    try:
        del model
        assert not any(ref() for ref in gone)
    finally:
        gc.enable()
    with pytest.raises(AdapterError, match="no longer exists"):
        container.parameters()


# Fuse


@pytest.mark.parametrize(
    ("make", "tolerance"),
    [(qwen3_model, 1e-5), (biased_model, 1e-5), (in_4_bits, 1e-5), (in_bfloat16, 0.1)],
)
def test_fused_weights_compute_what_the_adapters_computed(make, tolerance):
    model = make()
    base = model(TOKENS)
    container = AdapterContainer.from_model(model, CONFIG)
    container.swap(trained(container))
    adapted = model(TOKENS)
    report = container.fuse()
    assert not adapter_layers(model)
    assert float(mx.abs(model(TOKENS) - adapted).max()) < tolerance
    assert float(mx.abs(adapted - base).max()) > 3 * tolerance
    assert len(report.modules) == 14
    assert report.survival == pytest.approx(1, abs=0.01)
    assert type(model.layers[0].mlp.up_proj) is nn.Linear


def test_the_report_says_how_much_of_a_small_update_the_dtype_loses():
    def survival(dtype: mx.Dtype) -> float:
        model = in_bfloat16()
        container = AdapterContainer.from_model(model, CONFIG)
        container.swap(trained(container, size=0.003))
        report = container.fuse(dtype=dtype, min_survival=0)
        assert {module.dtype for module in report.modules} == {str(dtype).split(".")[-1]}
        assert report.worst.survival == min(module.survival for module in report.modules)
        assert max(module.relative_size for module in report.modules) < 0.02
        return report.survival

    assert survival(mx.float32) == pytest.approx(1, abs=1e-4)
    assert survival(mx.bfloat16) < 0.9


def test_survival_is_measured_along_the_update():
    model = qwen3_model()
    container = AdapterContainer.from_model(model, AdapterConfig(keys=["self_attn.q_proj"]))
    container.swap(trained(container, size=0.003))
    layer = model.layers[0].self_attn.q_proj
    base, delta = float_weight(layer.base), layer.delta()
    moved = (base + delta).astype(mx.bfloat16).astype(mx.float32) - base
    report = container.fuse(dtype=mx.bfloat16)
    expected = float((moved * delta).sum() / (delta * delta).sum())
    assert report.modules[0].survival == pytest.approx(expected, abs=1e-5)
    assert report.modules[0].path == "model.layers.0.self_attn.q_proj"


def test_a_fresh_adapter_fuses_to_the_base_exactly():
    model = qwen3_model()
    base = arrays(model)
    report = AdapterContainer.from_model(model, CONFIG).fuse()
    assert report.survival == 1
    assert all(mx.array_equal(array, base[name]) for name, array in arrays(model).items())


def test_fusing_leaves_the_global_random_state_alone():
    _model, container = adapt()
    state = random_state()
    container.fuse()
    assert random_state() == state


@pytest.mark.parametrize("leave", [AdapterContainer.unload, AdapterContainer.fuse])
def test_a_container_that_was_taken_off_says_so(leave):
    _model, container = adapt()
    leave(container)
    for action in (
        container.unload,
        container.fuse,
        container.layers,
        container.advance,
        lambda: container.disabled().__enter__(),
    ):
        with pytest.raises(AdapterError, match=r"in no model.*load\(model\)"):
            action()


def test_an_unloaded_container_does_not_touch_its_successor():
    model, container = adapt()
    container.unload()
    successor = AdapterContainer.from_model(model, CONFIG)
    with pytest.raises(AdapterError, match="in no model"):
        container.unload()
    assert AdapterContainer.of(model) is successor and len(successor.layers()) == 14


# Setups by plain options


def test_lora_options_become_a_config(tmp_path):
    path = tmp_path / "new" / "adapters.safetensors"
    options = {"lora_layers": 1, "lora_rank": 3, "lora_scale": 20.0, "lora_dropout": 0.1}
    options["lora_keys"] = ["self_attn.v_proj"]
    model, stats = create_lora_setup(qwen3_model(), options, True, str(path))
    container = AdapterContainer.of(model)
    assert container.config == AdapterConfig(
        num_layers=1, rank=3, scale=20.0, dropout=0.1, keys=["self_attn.v_proj"]
    )
    assert container.publish_path == path and not path.exists()
    assert stats == memory_stats(model)


def test_lora_layers_beyond_the_depth_are_all_layers():
    model, _ = create_lora_setup(qwen3_model(), {"lora_layers": 8}, auto_reload=False)
    container = AdapterContainer.of(model)
    assert container.config == AdapterConfig(num_layers=2) and container.publish_path is None


def test_unknown_lora_options_are_refused_with_the_nearest():
    model = qwen3_model()
    with pytest.raises(ConfigError, match=r"\['lora_rnk'\].*did you mean \['lora_rank'\]"):
        create_lora_setup(model, {"lora_rnk": 8})
    with pytest.raises(ConfigError, match="num_layers is 0"):
        create_lora_setup(model, {"lora_layers": 0})
    assert AdapterContainer.of(model) is None


def test_a_qlora_setup_measures_the_bytes_before_and_after(tmp_path):
    model = qwen3_model()
    before = memory_stats(model)["base_bytes"]
    path = tmp_path / "adapters.safetensors"
    model, stats = create_qlora_setup(
        model, {"lora_rank": 4}, {"bits": 4, "group_size": 64}, adapter_save_path=path
    )
    assert stats["base_bytes_before_quantization"] == before
    assert stats["base_bytes"] == memory_stats(model)["base_bytes"] < before / 5
    assert stats["quantization_factor"] == before / stats["base_bytes"]
    assert stats["quantization_savings_percent"] == 100 * (1 - stats["base_bytes"] / before)
    assert stats["modules_left_unquantized"] == 0
    assert stats["memory_savings_percent"] < 100


@pytest.mark.parametrize(
    ("lora", "quantization", "path"),
    [
        ({"lora_keys": ["q_proj"]}, {"bits": 4}, "a.safetensors"),
        ({}, {"bits": 4, "groupsize": 64}, "a.safetensors"),
        ({}, {"bits": 4}, "a.bin"),
    ],
)
def test_a_qlora_setup_that_fails_leaves_the_model_as_it_was(lora, quantization, path, tmp_path):
    model = qwen3_model()
    before = arrays(model)
    with pytest.raises((AdapterError, ConfigError)):
        create_qlora_setup(model, lora, quantization, adapter_save_path=tmp_path / path)
    assert all(array is before[name] for name, array in arrays(model).items())


def test_extract_params_gives_the_adapters_and_refuses_a_plain_model():
    model = qwen3_model()
    with pytest.raises(AdapterError, match="no adapters"):
        extract_params(model)
    apply_lora(model, lora_rank=2)
    assert extract_params(model).keys() == AdapterContainer.of(model).parameters().keys()


def test_merge_weights_merges():
    model = apply_lora(qwen3_model(), lora_rank=2)
    container = AdapterContainer.of(model)
    container.swap(trained(container))
    adapted = model(TOKENS)
    assert merge_weights(model) is model
    assert AdapterContainer.of(model) is None
    assert mx.allclose(model(TOKENS), adapted, atol=1e-5)


def test_savings_are_what_the_setup_then_measures():
    model = qwen3_model()
    promised = compute_lora_memory_savings(model, 4, 1)
    assert AdapterContainer.of(model) is None
    apply_lora(model, lora_rank=4, lora_layers=1)
    assert memory_stats(model) == promised


def test_attaching_gives_a_model_the_adapters_and_config_of_a_file(tmp_path):
    path = tmp_path / "a.safetensors"
    model = qwen3_model()
    container = AdapterContainer.from_model(
        model, AdapterConfig(num_layers=1, rank=3, keys=["mlp.up_proj"])
    )
    container.swap(trained(container), version=5)
    container.publish(path)
    other = qwen3_model()
    attached = AdapterContainer.from_directory(path).load(other)
    assert attached.version == 5 and attached.config == container.config
    assert mx.array_equal(model(TOKENS), other(TOKENS))


def test_attaching_adapters_of_a_quantized_base_quantizes_the_base(tmp_path):
    path = tmp_path / "a.safetensors"
    model = in_4_bits()
    container = AdapterContainer.from_model(model, CONFIG)
    container.swap(trained(container))
    container.publish(path)
    other = qwen3_model()
    AdapterContainer.from_directory(path).load(other)
    assert mx.array_equal(model(TOKENS), other(TOKENS))


def test_a_model_that_an_adapter_does_not_fit_stays_unadapted(tmp_path):
    path = tmp_path / "a.safetensors"
    _model, container = adapt()
    container.publish(path)
    other = qwen3_model(seed=1)
    with pytest.raises(AdapterError, match="base fingerprint"):
        AdapterContainer.from_directory(path).load(other)
    assert AdapterContainer.of(other) is None


# Apart from a model, and on it again


@pytest.mark.parametrize("make", BASES)
def test_unloaded_adapters_can_be_loaded_again(make):
    model, container = adapt(make)
    container.swap(trained(container), version=4)
    adapted = model(TOKENS)
    container.unload()
    assert container.version == 4 and len(container.parameters()) == 28
    assert container.load(model) is container and AdapterContainer.of(model) is container
    assert mx.array_equal(model(TOKENS), adapted)
    assert container.version == 4


def test_adapters_are_hot_swapped_by_unloading_one_and_loading_another(tmp_path):
    model, first = adapt()
    first.swap(trained(first, 1))
    first.publish(tmp_path / "first.safetensors")
    with_first = model(TOKENS)
    first.unload()
    second = AdapterContainer.from_model(model, AdapterConfig(kind="dora", keys=["mlp.up_proj"]))
    second.swap(trained(second, 2))
    second.unload()
    AdapterContainer.from_directory(tmp_path / "first.safetensors").load(model)
    assert mx.array_equal(model(TOKENS), with_first)


def test_loading_freezes_the_rest_and_unloading_gives_it_back():
    model, container = adapt()
    container.unload()
    before = tree_flatten(model.trainable_parameters(), destination={}).keys()
    container.load(model)
    assert tree_flatten(model.trainable_parameters(), destination={}).keys() == (
        container.parameters().keys()
    )
    container.unload()
    assert tree_flatten(model.trainable_parameters(), destination={}).keys() == before


def test_a_container_is_on_one_model_at_a_time_and_a_model_in_one_container():
    model, container = adapt()
    other = qwen3_model()
    with pytest.raises(AdapterError, match=r"call unload\(\) first"):
        container.load(other)
    container.unload()
    container.load(other)
    AdapterContainer.from_model(model, CONFIG)
    container.unload()
    with pytest.raises(AdapterError, match="already has adapters"):
        container.load(model)


def test_an_unloaded_container_does_not_hold_the_model():
    model, container = adapt()
    gone = [weakref.ref(model), weakref.ref(model.layers[0].mlp.up_proj.base)]
    container.add("other", container.adapter())
    container.unload()
    gc.disable()
    try:
        del model
        assert not any(ref() for ref in gone)
    finally:
        gc.enable()
    assert container.names == ("default", "other")


def test_rules_that_quantize_do_so_before_adapters_of_a_file_are_put_on(tmp_path):
    rules = [LoRARule(module_path=".*q_proj", rank=2, weight_qtype="nf4")]
    model, container = adapt(config=AdapterConfig(rules=rules))
    container.swap(trained(container))
    container.publish(tmp_path / "a.safetensors")
    other = qwen3_model()
    AdapterContainer.from_directory(tmp_path / "a.safetensors").load(other)
    assert other.layers[0].self_attn.q_proj.base.mode == "nf4"
    assert mx.array_equal(model(TOKENS), other(TOKENS))


def test_a_base_is_not_quantized_for_adapters_that_do_not_fit_it(tmp_path):
    _model, container = adapt(in_4_bits)
    tensors = container.parameters()
    tensors.popitem()
    adapter = replace(container.adapter(), arrays=tensors)
    write_adapter_file(tmp_path / "a.safetensors", adapter)
    other = qwen3_model()
    with pytest.raises(AdapterError, match="missing"):
        AdapterContainer.from_directory(tmp_path / "a.safetensors").load(other)
    assert not any(is_quantized(module) for module in other.modules())


# Other ranks and scales


def other_rank(tmp_path, rank: int, make=qwen3_model, **words):
    """A model with trained adapters of a rank, and their file."""
    model, container = adapt(make, AdapterConfig(rank=rank, **words))
    container.swap(trained(container, rank), version=rank)
    container.publish(tmp_path / f"{rank}.safetensors")
    return model, tmp_path / f"{rank}.safetensors"


@pytest.mark.parametrize("make", [qwen3_model, in_4_bits])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_compiled_function_sees_a_swap_to_another_rank_and_scale(tmp_path, make, kind):
    theirs, path = other_rank(tmp_path, 7, make, scale=0.5, kind=kind)
    model, container = adapt(make, AdapterConfig(rank=4, scale=3.0, kind=kind))
    compiled = mx.compile(model, inputs=[model.state])
    before = compiled(TOKENS)
    container.swap(trained(container))
    swapped = compiled(TOKENS)
    assert float(mx.abs(swapped - before).max()) > 0.01
    assert container.swap(path) == 7
    assert mx.allclose(compiled(TOKENS), theirs(TOKENS), atol=1e-5)
    assert not mx.allclose(compiled(TOKENS), swapped, atol=0.01)
    assert {layer.rank for layer in container.layers().values()} == {7}


def test_tensors_of_another_rank_are_swapped_in_and_written_with_it(tmp_path):
    model, container = adapt(config=AdapterConfig(rank=2, scale=1.5))
    wide = AdapterContainer.from_model(other := qwen3_model(), AdapterConfig(rank=6))
    container.swap(trained(wide))
    container.publish(tmp_path / "a.safetensors")
    assert {m.rank for m in inspect_adapter(tmp_path / "a.safetensors").modules} == {6}
    wide.unload()
    AdapterContainer.from_directory(tmp_path / "a.safetensors").load(other)
    assert mx.array_equal(model(TOKENS), other(TOKENS))


def test_an_optimizer_of_another_rank_is_noticed_at_the_next_update(tmp_path):
    """Its moments broadcast with a gradient of rank 1, and the tensors grow back in silence."""
    _other, path = other_rank(tmp_path, 1)
    model, container = adapt()
    optimizer = optim.Adam(learning_rate=1e-2)
    for step in range(2):
        _, gradient = nn.value_and_grad(model, loss)(model, TOKENS)
        optimizer.update(model, gradient)
        if step == 0:
            assert container.advance() == 1
            container.swap(path)
    with pytest.raises(AdapterError, match=r"changed their shapes.*make a new optimizer"):
        container.advance()


def test_tensors_that_disagree_about_their_rank_are_refused():
    _model, container = adapt()
    tensors = trained(container)
    name = "model.layers.0.mlp.up_proj.lora_a"
    tensors[name] = mx.zeros((64, 9))
    with pytest.raises(AdapterError, match=r"up_proj\.lora_b: shape \(4, 128\), model has \(9,"):
        container.swap(tensors)


def test_a_scale_that_was_set_is_the_scale_that_is_written(tmp_path):
    model, container = adapt()
    container.swap(trained(container))
    for layer in container.layers().values():
        layer.set_scale(0.25)
    container.publish(tmp_path / "a.safetensors")
    assert {m.scale for m in inspect_adapter(tmp_path / "a.safetensors").modules} == {0.25}
    other = qwen3_model()
    AdapterContainer.from_directory(tmp_path / "a.safetensors").load(other)
    assert mx.array_equal(model(TOKENS), other(TOKENS))


@pytest.mark.parametrize(
    "config",
    [
        AdapterConfig(rank=2, dropout=0.5),
        AdapterConfig(rules=[LoRARule(module_path=".*q_proj", rank=2, dropout=0.5)]),
        AdapterConfig.from_dict({"target_modules": ["q_proj"], "r": 2, "lora_dropout": 0.5}),
    ],
    ids=["words", "rules", "peft"],
)
def test_adapters_are_loaded_with_another_dropout_than_they_were_trained_with(tmp_path, config):
    path = tmp_path / "a.safetensors"
    trained, model, tokens = qwen3_model(), qwen3_model(), mx.array([[5, 17, 3]])
    first = AdapterContainer.from_model(trained, config)
    first.swap({name: array + 0.1 for name, array in first.parameters().items()})
    first.publish(path)
    container = AdapterContainer.from_directory(path).load(model, dropout=0)
    assert container.config == config.with_dropout(0) != config
    assert container.config.dropout == 0
    model.train()
    assert mx.array_equal(model(tokens), trained.eval()(tokens))


def test_a_swap_takes_the_dropout_of_the_file_and_does_not_turn_it_on(tmp_path):
    _model, path = other_rank(tmp_path, 4, dropout=0.5)
    model, container = adapt()
    model.eval()
    container.swap(path)
    assert container.config.dropout == 0.5
    assert mx.array_equal(model(TOKENS), model(TOKENS))


# Several by name


@pytest.fixture
def pair() -> tuple[nn.Module, AdapterContainer, dict[str, mx.array]]:
    """A model with two adapters of different kinds, ranks and modules, and what each computes."""
    model = qwen3_model()
    config = AdapterConfig(rank=3, kind="dora", keys=["self_attn.q_proj", "lm_head"])
    other = AdapterContainer.from_model(model, config)
    other.swap(trained(other, 2), version=8)
    logits = {"code": model(TOKENS)}
    other.unload()
    container = AdapterContainer.from_model(model, CONFIG, name="math")
    container.swap(trained(container, 1), version=5)
    container.add("code", other.adapter())
    return model, container, logits | {"math": model(TOKENS)}


def test_adapters_stand_side_by_side_and_one_is_active(pair):
    model, container, logits = pair
    assert container.names == ("math", "code") and container.name == "math"
    for name in ["code", "math", "code"]:
        container.activate(name)
        assert mx.array_equal(model(TOKENS), logits[name])
        assert container.version == {"math": 5, "code": 8}[name]
    assert container.config.rules[0].kind == "dora"
    assert tree_flatten(model.trainable_parameters(), destination={}).keys() == (
        container.parameters().keys()
    )


def test_a_compiled_function_sees_another_adapter_become_active(pair):
    model, container, logits = pair
    compiled = mx.compile(model, inputs=[model.state])
    for name in ["math", "code", "math"]:
        container.activate(name)
        assert mx.allclose(compiled(TOKENS), logits[name], atol=1e-5)


def test_training_one_adapter_leaves_the_other_alone(pair):
    model, container, logits = pair
    train(model)
    container.activate("code")
    assert mx.array_equal(model(TOKENS), logits["code"])


def test_the_reference_stays_the_base_while_adapters_change_places(pair):
    model, container, logits = pair
    base = qwen3_model()(TOKENS)
    with container.disabled():
        container.activate("code")
        assert mx.array_equal(model(TOKENS), base)
    assert mx.array_equal(model(TOKENS), logits["code"])
    container.activate("math")
    assert mx.array_equal(model(TOKENS), logits["math"])


def test_all_of_them_come_off_and_on_together(pair):
    model, container, logits = pair
    container.unload()
    assert mx.array_equal(model(TOKENS), qwen3_model()(TOKENS))
    container.load(model)
    assert mx.array_equal(model(TOKENS), logits["math"])
    container.activate("code")
    assert mx.array_equal(model(TOKENS), logits["code"])


def test_names_are_taken_once_found_or_listed_and_dropped(pair):
    _model, container, _logits = pair
    with pytest.raises(AdapterError, match="named 'code' already"):
        container.add("code", container.adapter())
    with pytest.raises(
        AdapterError, match=r"no adapter is named 'kode'; there are \['math', 'code"
    ):
        container.activate("kode")
    with pytest.raises(AdapterError, match="'math' is the active adapter"):
        container.remove("math")
    container.remove("code")
    assert container.names == ("math",)


def test_an_adapter_of_another_base_cannot_stand_beside(pair, tmp_path):
    _model, container, _logits = pair
    other = qwen3_model(seed=1)
    AdapterContainer.from_model(other, CONFIG).publish(tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="base fingerprint"):
        container.add("other", tmp_path / "a.safetensors")
    assert container.names == ("math", "code") and len(container.layers()) == 14


def test_a_shared_copy_has_the_active_adapter(pair):
    model, container, logits = pair
    container.activate("code")
    own = AdapterContainer.of(other := shared_copy(model))
    assert own.names == ("code",) and own.version == 8
    assert mx.array_equal(other(TOKENS), logits["code"])


# Combined


@pytest.fixture
def summands() -> tuple[nn.Module, AdapterContainer]:
    """A model with two LoRA adapters of different ranks, one of them on fewer modules."""
    model = qwen3_model()
    narrow = AdapterConfig(rank=2, scale=0.5, keys=["self_attn.q_proj"])
    other = AdapterContainer.from_model(model, narrow)
    other.swap(trained(other, 2))
    other.unload()
    container = AdapterContainer.from_model(model, CONFIG, name="a")
    container.swap(trained(container, 1))
    container.add("b", other.adapter())
    return model, container


def deltas(container: AdapterContainer, name: str) -> dict[str, mx.array]:
    container.activate(name)
    return {path: layer.delta() for path, layer in container.layers().items()}


def test_side_by_side_is_the_exact_sum_of_the_updates(summands):
    _model, container = summands
    container.add("sum", combine_adapters(container, {"a": 0.75, "b": -2.0}))
    a, b, total = (deltas(container, name) for name in ("a", "b", "sum"))
    assert total.keys() == a.keys() > b.keys()
    for path, delta in total.items():
        expected = 0.75 * a[path] - 2.0 * b.get(path, mx.zeros(delta.shape))
        assert mx.allclose(delta, expected, atol=1e-6)
    ranks = {layer.rank for layer in container.layers().values()}
    assert ranks == {4, 6}


@pytest.mark.parametrize("rank", [None, 3])
def test_the_nearest_of_a_rank_is_numpys_truncated_svd(summands, rank):
    _model, container = summands
    container.add("sum", combine_adapters(container, {"a": 1.0, "b": 1.0}))
    container.add("near", combine_adapters(container, {"a": 1.0, "b": 1.0}, "svd", rank=rank))
    path = "model.layers.0.self_attn.q_proj"
    u, s, v = np.linalg.svd(np.array(deltas(container, "sum")[path]))
    kept = rank or 4
    expected = (u[:, :kept] * s[:kept]) @ v[:kept]
    near = deltas(container, "near")[path]
    assert np.allclose(np.array(near), expected, atol=1e-5)
    assert container.layers()[path].rank == kept


def test_a_linear_combination_needs_equal_ranks_and_keeps_them(summands):
    _model, container = summands
    with pytest.raises(AdapterError, match=r"ranks \[2, 4\] cannot be summed; use method 'cat'"):
        container.add("sum", combine_adapters(container, {"a": 1.0, "b": 1.0}, "linear"))
    container.add("half", combine_adapters(container, {"a": 0.5}, "linear"))
    a, half = deltas(container, "a"), deltas(container, "half")
    assert all(mx.allclose(half[path], 0.5 * a[path], atol=1e-6) for path in a)


def test_experts_and_offsets_combine_too():
    model = expert_model()
    rules = [
        LoRARule(module_path=".*switch_mlp.*", rank=2),
        LoRARule(module_path=".*q_proj", rank=2, bias=True),
    ]
    container = AdapterContainer.from_model(model, AdapterConfig(rules=rules))
    container.swap(trained(container))
    full = model(TOKENS)
    for method in ["cat", "svd", "linear"]:
        container.add(method, combine_adapters(container, {"default": 1.0}, method))
        container.activate(method)
        assert mx.allclose(model(TOKENS), full, atol=1e-4), method


def test_a_combination_is_an_adapter_like_any_other(summands, tmp_path):
    model, container = summands
    container.add("sum", combine_adapters(container, {"a": 1.0, "b": 0.5}))
    container.activate("sum")
    assert container.version == 0
    for where in (tmp_path / "a.safetensors", tmp_path / "mlx", tmp_path / "peft"):
        if where.suffix:
            container.publish(where)
        else:
            container.save(where, layout=where.name)
        other = qwen3_model()
        AdapterContainer.from_directory(where).load(other)
        assert mx.allclose(other(TOKENS), model(TOKENS), atol=1e-5)


@pytest.mark.parametrize(
    ("weights", "method", "rank", "message"),
    [
        ({}, "cat", None, "weights is empty"),
        ({"a": 1.0}, "mean", None, "method is 'mean'"),
        ({"a": 1.0}, "cat", 3, "rank is 3 for method 'cat'"),
        ({"a": 1.0}, "svd", 0, "rank is 0"),
        ({"c": 1.0}, "cat", None, "no adapter is named 'c'"),
    ],
)
def test_a_combination_that_makes_no_sense_says_why(summands, weights, method, rank, message):
    _model, container = summands
    with pytest.raises((AdapterError, ConfigError), match=message):
        container.add("sum", combine_adapters(container, weights, method, rank=rank))


def test_lengths_of_dora_do_not_add_up(pair):
    _model, container, _logits = pair
    with pytest.raises(AdapterError, match="'code' has DoRA on lm_head and 2 more"):
        container.add("sum", combine_adapters(container, {"math": 1.0, "code": 1.0}))
