"""A linear layer with LoRA as one operation: exact with its gradients, and left out if need be."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from tests.fast_cpu.arrays import assert_close, normal
from textpolicy.adapters.config.rules import LoRARule
from textpolicy.adapters.layers import lora as layers
from textpolicy.adapters.layers.lora import LoRALinear
from textpolicy.adapters.quantization.packed_product import use_fast_products
from textpolicy.fast_cpu import lora
from textpolicy.fast_cpu.lora import lora_linear

pytestmark = pytest.mark.usefixtures("compiled_operations")

COUNTED = lora


def arrays_of(rows: int, inputs: int, outputs: int, rank: int, *, bias: bool = True):
    """Return x, W, A, B, the scale and perhaps a bias."""
    arrays = [
        normal(rows, inputs),
        normal(outputs, inputs, seed=1) / inputs**0.5,
        normal(inputs, rank, seed=2) / inputs**0.5,
        normal(rank, outputs, seed=3),
        mx.array(0.7),
    ]
    return [*arrays, normal(outputs, seed=4)] if bias else arrays


def compiled(x, weight, a, b, scale, bias=None) -> mx.array:
    y = lora_linear(x, weight, bias, a, b, scale)
    assert y is not None
    return y


def exact(arrays: list[mx.array], of_y: mx.array) -> list[np.ndarray]:
    """Return y and the gradients of all arrays in float64 by numpy alone."""
    x, w, a, b, s, *bias = (np.array(one, np.float64) for one in arrays)
    dy = np.array(of_y, np.float64)
    y = x @ w.T + s * (x @ a) @ b + sum(bias)
    narrow = s * dy @ b.T
    of_scale = (dy * ((x @ a) @ b)).sum()
    of_bias = [dy.sum(axis=0)] * len(bias)
    return [
        y,
        dy @ w + narrow @ a.T,
        dy.T @ x,
        x.T @ narrow,
        s * (x @ a).T @ dy,
        of_scale,
        *of_bias,
    ]


def assert_all_close(found: list[mx.array], arrays: list[mx.array], of_y: mx.array) -> None:
    """Compare y and the gradients of all arrays with the exact ones."""
    for one, right in zip(found, exact(arrays, of_y), strict=True):
        # The gradient of the scale is a sum of so many numbers of both signs.
        assert_close(one, right, least=1e-3 if right.ndim else of_y.size / 10)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 17, 48, 49, 1000])
@pytest.mark.parametrize(
    ("inputs", "outputs", "rank"),
    [(64, 64, 1), (33, 65, 3), (200, 33, 8), (1, 5, 2), (130, 1, 64), (256, 300, 16)],
)
def test_values_and_all_gradients_are_exact(rows, inputs, outputs, rank, bias, threads):
    arrays = arrays_of(rows, inputs, outputs, rank, bias=bias)
    of_y = normal(rows, outputs, seed=5)
    (y,), gradients = mx.vjp(lambda *all: [compiled(*all)], arrays, [of_y])
    assert_all_close([y, *gradients], arrays, of_y)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: mx.contiguous(x.T).T,
        lambda x: mx.concatenate([x, x], axis=-1)[..., : x.shape[-1]],
        lambda x: mx.contiguous(x[::-1])[::-1],
        lambda x: mx.broadcast_to(x[:1], x.shape),
        lambda x: mx.broadcast_to(x[:, :1], x.shape),
    ],
    ids=["transposed", "with gaps", "backwards", "one row", "one column"],
)
def test_arrays_whose_numbers_are_not_side_by_side_are_read_as_they_are(view):
    for place in range(4):
        arrays = arrays_of(9, 40, 30, 4)
        arrays[place] = view(arrays[place])
        of_y = view(normal(9, 30, seed=5))
        (y,), gradients = mx.vjp(lambda *all: [compiled(*all)], arrays, [of_y])
        assert_all_close([y, *gradients], arrays, of_y)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize("reason", ["scale", "gate", "zeros"])
def test_a_layer_that_adds_nothing_gives_the_bits_of_its_base(rows, bias, reason, compiled_calls):
    base = nn.Linear(130, 70, bias=bias)
    layer = LoRALinear(base, LoRARule(rank=4), mx.random.key(1))
    if reason != "zeros":
        layer.lora_b = normal(4, 70)
    if reason == "scale":
        layer.set_scale(0.0)
    if reason == "gate":
        layer.set_enabled(mx.array(False))
    x = normal(rows, 130)
    np.testing.assert_array_equal(np.array(layer(x)), np.array(base(x)))
    assert compiled_calls == ["lora"]


def test_what_a_row_gives_does_not_depend_on_the_rows_beside_it():
    x, *others = arrays_of(16, 256, 300, 8)
    together = np.array(compiled(x, *others))
    for rows in (1, 2, 5):
        alone = np.array(compiled(x[3 : 3 + rows], *others))
        np.testing.assert_allclose(alone, together[3 : 3 + rows], rtol=1e-5, atol=1e-5)


def layer_of(**options) -> LoRALinear:
    base = nn.Linear(64, 48)
    layer = LoRALinear(base, LoRARule(rank=4, scale=0.7, **options), mx.random.key(1))
    layer.lora_b = normal(4, 48, seed=3)
    return layer


def by_numpy(layer: LoRALinear, x: mx.array) -> np.ndarray:
    bias = layer.merged_bias()
    assert bias is not None
    weight = np.array(layer.base.weight.astype(mx.float32), np.float64)
    a, b, x64 = (np.array(one, np.float64) for one in (layer.lora_a, layer.lora_b, x))
    return x64 @ weight.T + layer.scale * (x64 @ a) @ b + np.array(bias.astype(mx.float32))


@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 5), (2, 1, 3)])
def test_a_layer_takes_any_number_of_axes(batch, compiled_calls):
    layer, x = layer_of(), normal(*batch, 64)
    assert_close(layer(x), by_numpy(layer, x))
    assert compiled_calls == ["lora"]


def test_a_layer_without_any_row_gives_none(compiled_calls):
    assert layer_of()(mx.zeros((0, 64))).shape == (0, 48)
    assert not compiled_calls


def test_a_layer_trains_its_factors_alone(compiled_calls):
    layer, x, of_y = layer_of(), normal(20, 64), normal(20, 48, seed=5)
    layer.freeze()
    layer.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
    all_gradients = nn.value_and_grad(layer, lambda: (layer(x) * of_y).sum())()[1]
    gradients = dict(tree_flatten(all_gradients))
    arrays = [x, layer.base.weight, layer.lora_a, layer.lora_b, mx.array(layer.scale)]
    right = exact(arrays, of_y)
    assert gradients.keys() == {"lora_a", "lora_b"}
    assert_close(gradients["lora_a"], right[3])
    assert_close(gradients["lora_b"], right[4])
    assert compiled_calls == ["lora", "lora_gradients"]


def test_dropout_is_left_to_other_operations_only_in_training(compiled_calls):
    layer, x = layer_of(dropout=0.5), normal(2000, 64)
    expected = by_numpy(layer, x)
    layer.train()
    found, base = np.array(layer(x)), np.array(layer.base(x))
    assert not compiled_calls
    assert np.abs(found - expected).max() > 0.1
    # Dropout keeps the mean.
    mean, right = (np.mean((one - base) * (expected - base)) for one in (found, expected))
    assert abs(mean / right - 1) < 0.1
    layer.eval()
    assert_close(layer(x), expected)
    assert compiled_calls == ["lora"]


def test_a_trained_bias_is_left_to_other_operations(compiled_calls):
    layer, x = layer_of(bias=True), normal(5, 64)
    layer.lora_bias = normal(48, seed=6)
    assert_close(layer(x), by_numpy(layer, x))
    assert layer.compiled_parts() is None and not compiled_calls


@pytest.mark.parametrize("what", ["base", "x"])
def test_bfloat16_is_left_to_other_operations(what, compiled_calls):
    layer, x = layer_of(), normal(5, 64)
    if what == "base":
        layer.base.set_dtype(mx.bfloat16)
    else:
        x = x.astype(mx.bfloat16)
    expected = by_numpy(layer, x.astype(mx.float32))
    np.testing.assert_allclose(layer(x).astype(mx.float32), expected, rtol=0.05, atol=0.1)
    assert not compiled_calls


@pytest.mark.parametrize("rows", [5, 200])
def test_a_quantized_base_is_called_itself(rows, compiled_calls):
    layer, x, of_y = layer_of(), normal(rows, 64), normal(rows, 48, seed=5)
    layer.base = nn.QuantizedLinear.from_linear(layer.base, group_size=32, bits=8)
    layer.freeze()
    layer.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
    use_fast_products(layer)
    q = layer.base
    weight = mx.dequantize(q.weight, q.scales, q.biases, group_size=32, bits=8)
    arrays = [x, weight, layer.lora_a, layer.lora_b, mx.array(layer.scale), q.bias]
    right = exact(arrays, of_y)
    loss = nn.value_and_grad(layer, lambda: (layer(x) * of_y).sum())
    gradients = dict(tree_flatten(loss()[1]))
    assert_close(layer(x), right[0])
    assert_close(gradients["lora_a"], right[3])
    assert_close(gradients["lora_b"], right[4])
    assert not compiled_calls


def test_another_class_of_base_is_called_itself(compiled_calls):
    class Doubled(nn.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    layer, x = layer_of(), normal(5, 64)
    before = np.array(layer(x)) + np.array(layer.base(x))
    compiled_calls.clear()
    layer.base.__class__ = Doubled
    np.testing.assert_allclose(layer(x), before, rtol=1e-4, atol=1e-5)
    assert not compiled_calls


def test_without_compiled_operations_the_numbers_are_the_same(monkeypatch):
    layer, x = layer_of(), normal(5, 64)
    found = layer(x)
    monkeypatch.setattr(layers, "lora_linear", lambda *_: None)
    assert_close(layer(x), np.array(found, np.float64))
