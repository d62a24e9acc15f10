"""Adapters: the identity when fresh, exact to take off, safe to swap, and alone in training."""

import copy
import gc
import math
import weakref
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten

from tests.tiny import TOKENS, biased_model, qwen3_model
from textpolicy.adapters import (
    AdapterConfig,
    AdapterContainer,
    memory_stats,
    quantize,
    twin,
)
from textpolicy.adapters.layers import adapter_layers
from textpolicy.adapters.quantization import float_weight
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


@pytest.mark.parametrize("make", BASES)
def test_load_then_unload_restores_the_very_modules_and_arrays(make):
    model = make()
    arrays_before, modules_before = arrays(model), dict(model.named_modules())
    trainable_before = tree_flatten(model.trainable_parameters(), destination={})
    container = AdapterContainer.from_model(model, CONFIG)
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
    freeze_base(model)
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
        layer["_scale"] = mx.array(0.0)
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


def test_a_long_list_of_misfits_is_counted():
    _model, container = adapt()
    with pytest.raises(AdapterError, match="and 20 more like the last line"):
        container.swap({})


# Twins


@pytest.mark.parametrize("make", BASES)
def test_a_twin_shares_every_array_and_computes_the_same(make):
    model, container = adapt(make)
    container.swap(trained(container), version=3)
    other = twin(model)
    mine, own = arrays(model), AdapterContainer.of(other)
    assert own is not container and AdapterContainer.of(model) is container
    assert own.version == 3 and own.publish_path is None and own.config == container.config
    assert arrays(other).keys() == mine.keys()
    assert all(array is mine[name] for name, array in arrays(other).items())
    assert mx.array_equal(bits(model(TOKENS)), bits(other(TOKENS)))


def test_a_twin_keeps_frozen_and_training_flags_and_then_has_its_own():
    model, _ = adapt()
    model.train()
    other = twin(model)
    trainable = tree_flatten(model.trainable_parameters(), destination={}).keys()
    assert tree_flatten(other.trainable_parameters(), destination={}).keys() == trainable
    other.eval()
    other.freeze()
    assert all(module.training for module in model.modules())
    assert tree_flatten(model.trainable_parameters(), destination={}).keys() == trainable


@pytest.mark.parametrize("make", [qwen3_model, in_4_bits])
def test_training_swapping_and_unloading_one_twin_never_touches_the_other(make):
    model, container = adapt(make)
    other = twin(model)
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


def test_a_twin_takes_no_memory_until_its_adapters_differ():
    model = qwen3_model(hidden_size=512, vocab_size=2048)
    container = AdapterContainer.from_model(model, CONFIG)
    start = mx.get_active_memory()
    other = twin(model)
    mx.eval(other.parameters())
    assert mx.get_active_memory() == start
    own = AdapterContainer.of(other)
    own.swap(trained(container))
    stats = memory_stats(model)
    grown = mx.get_active_memory() - start
    assert stats["adapter_bytes"] <= grown < 1.2 * stats["adapter_bytes"]
    assert stats["adapter_bytes"] < stats["base_bytes"] / 20


def test_a_twin_of_an_unadapted_model_has_no_adapters():
    model = qwen3_model()
    other = twin(model)
    AdapterContainer.from_model(other, CONFIG)
    assert AdapterContainer.of(model) is None
    assert AdapterContainer.of(other) is not None


def test_a_module_that_occurs_twice_occurs_twice_in_the_twin():
    model = qwen3_model()
    model.layers[1].self_attn = model.layers[0].self_attn
    other = twin(model)
    assert other.layers[1].self_attn is other.layers[0].self_attn
    assert other.layers[0].self_attn is not model.layers[0].self_attn


def test_the_adapters_of_a_deep_copy_are_refused():
    model, _ = adapt()
    with pytest.raises(AdapterError, match=r"twin\(model\)"):
        AdapterContainer.of(copy.deepcopy(model))


def test_a_dropped_model_is_freed_at_once():
    model, container = adapt()
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
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
        with pytest.raises(AdapterError, match=r"on no model.*load\(model\)"):
            action()


def test_an_unloaded_container_does_not_touch_its_successor():
    model, container = adapt()
    container.unload()
    successor = AdapterContainer.from_model(model, CONFIG)
    with pytest.raises(AdapterError, match="on no model"):
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
