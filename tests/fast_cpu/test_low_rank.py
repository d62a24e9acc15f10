"""The update of a LoRA layer as one operation: exact, and only where no gradient is needed."""

import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from textpolicy.adapters.config.rules import LoRARule
from textpolicy.adapters.layers import lora
from textpolicy.adapters.layers.lora import LoRALinear
from textpolicy.fast_cpu.gradients import without_gradients
from textpolicy.fast_cpu.low_rank import add_low_rank
from textpolicy.fast_cpu.mlx_operations import reason_of_none

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the operations are for Linux")


@pytest.fixture(autouse=True)
def on_a_cpu_with_compiled_operations():
    if reason := reason_of_none():
        pytest.skip(reason)
    if mx.default_device().type != mx.cpu:
        pytest.skip("the operations are for CPUs")


def arrays(rows: int, inputs: int, outputs: int, rank: int) -> list[mx.array]:
    shapes = [(rows, outputs), (rows, inputs), (inputs, rank), (rank, outputs)]
    keys = mx.random.split(mx.random.key(3), len(shapes))
    drawn = [mx.random.normal(shape, key=key) for shape, key in zip(shapes, keys, strict=True)]
    return [*drawn, mx.array(1.7)]


@pytest.mark.parametrize(
    ("inputs", "outputs", "rank"),
    [(5, 7, 1), (64, 32, 8), (577, 100, 13), (576, 1536, 16), (130, 64, 256)],
)
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_the_update_is_exact_up_to_rounding_and_the_same_beside_other_rows(
    rows, inputs, outputs, rank
):
    y, x, a, b, scale = arrays(rows, inputs, outputs, rank)
    with without_gradients():
        found = add_low_rank(y, x, a, b, scale)
        last = add_low_rank(y[-1:], x[-1:], a, b, scale)
    assert found is not None and last is not None
    wide = [np.array(one, np.float64) for one in (y, x, a, b)]
    expected = wide[0] + 1.7 * (wide[1] @ wide[2]) @ wide[3]
    assert np.abs(np.array(found) - expected).max() < 2e-6 * np.abs(expected).max()
    assert mx.array_equal(found[-1:], last)


def test_other_products_are_left_to_other_operations():
    y, x, a, b, scale = arrays(4, 64, 32, 8)
    assert add_low_rank(y, x, a, b, scale) is None
    with without_gradients():
        assert add_low_rank(y, x, a, b, scale) is not None
        assert add_low_rank(*arrays(65, 64, 32, 8)) is None
        assert add_low_rank(*arrays(4, 64, 32, 257)) is None
        assert add_low_rank(y.astype(mx.bfloat16), x.astype(mx.bfloat16), a, b, scale) is None


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_computes_the_same_with_and_without_gradients(bias, monkeypatch):
    layer = LoRALinear(nn.Linear(64, 48), LoRARule(rank=8, scale=2.0, bias=bias), mx.random.key(1))
    x = mx.random.normal((2, 3, 64), key=mx.random.key(2))
    with without_gradients():
        assert mx.array_equal(layer(x), layer.base(x.reshape(6, 64)).reshape(2, 3, 48))
    layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(3))
    if bias:
        layer.lora_bias = mx.random.normal(layer.lora_bias.shape, key=mx.random.key(4))
    calls: list[bool] = []
    whole = lora.add_low_rank

    def counted(*given: mx.array) -> mx.array | None:
        added = whole(*given)
        calls.append(added is not None)
        return added

    monkeypatch.setattr(lora, "add_low_rank", counted)
    trained = layer(x)
    with without_gradients():
        decoded = layer(x)
        layer.set_enabled(mx.array(False))
        assert mx.array_equal(layer(x), layer.base(x.reshape(6, 64)).reshape(2, 3, 48))
    assert calls == [False, True, True]
    np.testing.assert_allclose(np.array(decoded), np.array(trained), rtol=2e-5, atol=2e-5)
