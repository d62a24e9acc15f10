"""What depends on an adapter's weights alone is computed once for many decode steps."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map

from tests.tiny import biased_model, qwen3_model
from textpolicy.adapters import AdapterConfig, AdapterContainer, quantize
from textpolicy.adapters.layers import dora
from textpolicy.adapters.layers.dora import DoRALayer
from textpolicy.fast_cpu import decoder_block
from textpolicy.fast_cpu.model_functions import use_fast_functions
from textpolicy.fast_cpu.weight_values import WeightValues, keep_weight_values, weight_value
from textpolicy.generation.decode import decode
from textpolicy.generation.decoding_batch import DecodingRow
from textpolicy.generation.engine import Engine
from textpolicy.types import Sampling

PROMPTS = [[5, 6, 7, 8], [9, 10, 11]]


def with_dora(model: nn.Module, **options) -> nn.Module:
    """Adapt every layer by DoRA with random factors and magnitudes, so that each ratio matters."""
    AdapterContainer.from_model(model, AdapterConfig(kind="dora", rank=4, **options))
    for number, layer in enumerate(layers_of(model)):
        key = mx.random.key(number)
        layer.lora_b = 0.3 * mx.random.normal(layer.lora_b.shape, key=key)
        layer.m = layer.m * (1 + 0.2 * mx.random.normal(layer.m.shape, key=key))
    use_fast_functions(model)
    mx.eval(model.parameters())
    return model


def layers_of(model: nn.Module) -> list[DoRALayer]:
    return [layer for layer in model.modules() if isinstance(layer, DoRALayer)]


@pytest.fixture
def measured(monkeypatch) -> list[nn.Module]:
    """List the bases that are read to measure the norms of adapted weights."""
    bases: list[nn.Module] = []
    plain = dora.times_weight

    def times_weight(base: nn.Module, factor: mx.array) -> mx.array:
        bases.append(base)
        return plain(base, factor)

    monkeypatch.setattr(dora, "times_weight", times_weight)
    return bases


def row_of(tokens: int) -> DecodingRow:
    sampling, key = Sampling(max_tokens=tokens), np.array([0, 1], np.uint32)
    return DecodingRow(context=PROMPTS[0], sampling=sampling, stop=lambda _: None, key=key)


def drawn(model: nn.Module, *, tokens: int = 12) -> list[DecodingRow]:
    sampling = Sampling(max_tokens=tokens)
    groups = decode(model, PROMPTS, n=2, sampling=sampling, stop=lambda _: None, seed=3, max_rows=8)
    return [row for group in groups for row in group]


def assert_same_rows(some: list[DecodingRow], others: list[DecodingRow]) -> None:
    assert [row.tokens for row in some] == [row.tokens for row in others]
    for one, other in zip(some, others, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-5)


MODELS: dict[str, Callable[[], nn.Module]] = {"head norms": qwen3_model, "biases": biased_model}


@pytest.mark.parametrize("mode", [None, "affine", "nf4"])
@pytest.mark.parametrize("model", MODELS)
def test_steps_with_dora_draw_what_the_layers_own_code_draws(model, mode, monkeypatch):
    adapted = MODELS[model]()
    if mode:
        quantize(adapted, mode=mode)
    with_dora(adapted)
    compiled = drawn(adapted)
    monkeypatch.setattr(decoder_block.CompiledLinear, "of", lambda layer: None)
    assert_same_rows(compiled, drawn(adapted))


def test_norms_are_measured_once_for_all_steps(measured):
    model = with_dora(qwen3_model())
    drawn(model, tokens=3)
    after_three = len(measured)
    drawn(model, tokens=23)
    # Reading the prompts measures them too.
    assert len(measured) == 2 * after_three


def test_a_trainers_forward_pass_keeps_nothing(measured):
    model = with_dora(qwen3_model())
    for _ in range(2):
        mx.eval(model(mx.array([PROMPTS[0]])))
    assert len(measured) == 2 * len(layers_of(model))


def test_a_running_engine_takes_a_changed_adapter():
    model, other = with_dora(qwen3_model()), with_dora(qwen3_model())
    for layer in layers_of(other):
        layer.m = 1.5 * layer.m
    rows = [row_of(9), row_of(9)]
    engines = [Engine(model), Engine(model)]
    for engine, row in zip(engines, rows, strict=True):
        engine.submit([row])
        for _ in range(4):
            engine.step()
    # The second engine goes on with another adapter, and the first has had no other.
    while engines[0].can_step:
        engines[0].step()
    for layer, changed in zip(layers_of(model), layers_of(other), strict=True):
        layer.m = changed.m
    engines[1].step()
    assert rows[0].logprobs[:4] == rows[1].logprobs[:4]
    assert abs(rows[0].logprobs[4] - rows[1].logprobs[4]) > 1e-3


def test_values_are_those_of_the_arrays_that_a_layer_has_now():
    layer = layers_of(with_dora(qwen3_model()))[0]
    with keep_weight_values({}):
        first = layer.ratio()
        assert layer.ratio() is first
        for change in (
            lambda: layer.set_enabled(mx.array(False)),
            lambda: layer.set_enabled(mx.array(True)),
            lambda: layer.set_scale(3.0),
            lambda: setattr(layer, "lora_b", 2 * layer.lora_b),
            lambda: setattr(layer, "lora_a", 2 * layer.lora_a),
            lambda: setattr(layer, "m", 2 * layer.m),
        ):
            before = layer.ratio()
            change()
            assert layer.ratio() is not before
            expected = layer._ratio()
            assert mx.allclose(layer.ratio(), expected, rtol=1e-6).item()


def test_an_engine_that_has_ended_keeps_no_value():
    model = with_dora(qwen3_model())
    engine = Engine(model)
    engine.submit([row_of(4)])
    engine.step()
    assert engine._weight_values
    while engine.can_step:
        engine.step()
    assert not engine._weight_values


def test_a_value_is_computed_again_after_any_change_of_what_a_layer_holds():
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.option, self.array = 1.0, mx.ones(3)
            self.list, self.pair = [mx.ones(1), [mx.ones(2)]], (mx.ones(1), "a")
            self.inner = nn.Linear(2, 2)

    layer = Layer()
    changes: list[Callable[[], object]] = [
        lambda: setattr(layer, "option", 2.0),
        lambda: setattr(layer, "added", None),
        lambda: delattr(layer, "added"),
        lambda: setattr(layer, "array", mx.ones(3)),
        lambda: layer.pop("array"),
        lambda: layer.list.append(mx.ones(1)),
        lambda: layer.list.pop(),
        lambda: layer.list.reverse(),
        lambda: layer.list[0].append(1),
        lambda: setattr(layer, "pair", layer.pair[::-1]),
        lambda: layer.inner.pop("bias"),
        lambda: setattr(layer.inner, "option", 3),
        lambda: layer.inner.eval(),
        lambda: setattr(layer.inner, "__class__", type("Other", (nn.Linear,), {})),
        lambda: setattr(layer, "__class__", type("Other", (Layer,), {})),
    ]
    with keep_weight_values({}):
        value = weight_value(layer, object)
        for number, change in enumerate(changes):
            assert weight_value(layer, object) is value, number
            change()
            assert weight_value(layer, object) is not value, number
            value = weight_value(layer, object)


def test_values_are_kept_in_their_block_only():
    layer, values = nn.Linear(2, 2), WeightValues()
    assert weight_value(layer, object) is not weight_value(layer, object)
    with keep_weight_values(values):
        value = weight_value(layer, object)
        with keep_weight_values({}):
            assert weight_value(layer, object) is not value
        assert weight_value(layer, object) is value
    assert weight_value(layer, object) is not value
    with keep_weight_values(values):
        assert weight_value(layer, object) is value


def test_a_value_that_cannot_be_computed_is_not_kept():
    layer, values = nn.Linear(2, 2), WeightValues()

    def fail() -> None:
        raise ValueError("no value")

    with keep_weight_values(values):
        for _ in range(2):
            with pytest.raises(ValueError, match="no value"):
                weight_value(layer, fail)
        assert weight_value(layer, object) is weight_value(layer, object)


def test_weights_replaced_while_an_engine_decodes_are_freed_by_its_next_step():
    model = qwen3_model(hidden_size=512)
    use_fast_functions(model)
    engine = Engine(model)
    engine.submit([row_of(9)])
    engine.step()
    engine.step()
    before = mx.get_active_memory()
    for _ in range(3):
        model.update(tree_map(lambda array: 2 * array, model.parameters()))
        engine.step()
    assert mx.get_active_memory() < 1.1 * before
    engine.cancel(engine._batch.rows[0])
    engine.step()
    assert not engine._weight_values


def test_an_engine_whose_last_row_is_cancelled_keeps_no_value():
    engine, row = Engine(with_dora(qwen3_model())), row_of(9)
    engine.submit([row])
    engine.step()
    assert engine._weight_values
    engine.cancel(row)
    assert not engine.can_step and not engine._weight_values
