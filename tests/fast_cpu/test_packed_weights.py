"""Products with packed weights: exact, independent of neighbouring rows, and not needed."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from tests.fast_cpu.arrays import normal
from textpolicy import fast_cpu
from textpolicy.adapters.quantization import packed_product as products
from textpolicy.adapters.quantization.nf4 import NF4Linear, pack_nf4, unpack_nf4
from textpolicy.adapters.quantization.packed_product import CPUQuantizedLinear, use_fast_products
from textpolicy.fast_cpu.packed_weights import (
    MOST_ROWS,
    multiplies_packed,
    packed_product,
    unpacked_weights,
)

pytestmark = pytest.mark.usefixtures("compiled_operations")


def packed(
    mode: str, weight: mx.array, group_size: int, bits: int = 4
) -> tuple[list[mx.array], mx.array]:
    """Return the arrays of a quantized matrix, and its numbers as another function reads them."""
    if mode == "nf4":
        arrays = pack_nf4(weight, group_size)
        return [*arrays], unpack_nf4(*arrays)
    arrays = mx.quantize(weight, group_size=group_size, bits=bits)
    return [*arrays], mx.dequantize(*arrays, group_size=group_size, bits=bits)


PACKED = [("affine", 4), ("affine", 8), ("nf4", 4)]
# Rows whose last vector of words is whole, and is not; outputs that fill up a tile, and do not.
SHAPES = [(1, 128), (3, 64), (16, 128), (17, 576), (50, 160), (130, 256), (33, 1536)]


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7, 12, 13, MOST_ROWS])
@pytest.mark.parametrize(
    ("mode", "bits", "group_size"),
    [
        *[("affine", bits, size) for bits in (4, 8) for size in (32, 64, 128)],
        *[("nf4", 4, size) for size in (32, 64, -1)],
    ],
)
def test_a_product_is_exact_up_to_rounding(mode, bits, group_size, rows):
    for outputs, inputs in SHAPES:
        if inputs % max(group_size, 1):
            continue
        arrays, weight = packed(mode, normal(outputs, inputs), group_size, bits)
        x = normal(rows, inputs, seed=1)
        found = packed_product(mode, bits, x, *arrays)
        assert found is not None and found.shape == (rows, outputs)
        expected = np.array(x, np.float64) @ np.array(weight, np.float64).T
        np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=2e-6 * inputs)


@pytest.mark.parametrize(
    ("mode", "bits", "group_size"),
    [("affine", 4, 32), ("affine", 4, 64), ("affine", 8, 32), ("affine", 8, 64), ("nf4", 4, 64)],
)
def test_a_row_gives_the_same_bits_beside_any_rows_and_with_any_threads(
    mode, bits, group_size, threads_restored
):
    arrays, _ = packed(mode, normal(600, 576), group_size, bits)
    x = normal(MOST_ROWS, 576, seed=1)
    together = packed_product(mode, bits, x, *arrays)
    for count in (1, 2, 3, 4, 5, 6, 7, 8, 11, 23):
        fast_cpu.set_threads(1 + count % 2)
        some = packed_product(mode, bits, x[:count], *arrays)
        assert mx.array_equal(some, together[:count])
    in_three_axes = packed_product(mode, bits, x.reshape(4, 16, 576), *arrays)
    assert mx.array_equal(in_three_axes.reshape(MOST_ROWS, 600), together)


@pytest.mark.parametrize(("mode", "bits"), PACKED)
def test_special_numbers_of_a_row_stay_in_the_row(mode, bits):
    arrays, _ = packed(mode, normal(20, 192), 64, bits)
    x = normal(7, 192, seed=1)
    clean = packed_product(mode, bits, x, *arrays)
    x[3, 5] = mx.nan
    x[5, 191] = mx.inf
    found = packed_product(mode, bits, x, *arrays)
    assert mx.all(mx.isnan(found[3])) and not mx.any(mx.isfinite(found[5]))
    others = mx.array([0, 1, 2, 4, 6])
    assert mx.array_equal(found[others], clean[others])


@pytest.mark.parametrize(
    ("mode", "bits", "group_size"),
    [
        *[("affine", bits, 64) for bits in (2, 3, 4, 5, 6, 8)],
        *[("affine", 3, 32), ("affine", 4, 128), ("nf4", 4, -1)],
    ],
)
def test_weights_are_unpacked_as_others_unpack_them(mode, bits, group_size):
    for outputs, inputs in [(3, 128), (301, 1024)]:
        arrays, expected = packed(mode, normal(outputs, inputs), group_size, bits)
        found = unpacked_weights(mode, bits, *arrays)
        assert found is not None and found.shape == expected.shape
        np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-6, atol=1e-6)


def test_other_formats_types_and_many_rows_are_left_to_other_functions():
    arrays, _ = packed("affine", normal(16, 128), 64)
    x = normal(4, 128, seed=1)
    assert packed_product("affine", 4, x, *arrays) is not None
    assert packed_product("affine", 4, x.astype(mx.bfloat16), *arrays) is None
    assert packed_product("affine", 4, normal(MOST_ROWS + 1, 128), *arrays) is None
    assert packed_product("affine", 4, x[:0], *arrays) is None
    halves = [arrays[0], *(array.astype(mx.float16) for array in arrays[1:])]
    assert packed_product("affine", 4, x, *halves) is None
    assert unpacked_weights("affine", 4, *halves) is None
    six = mx.quantize(normal(16, 128), group_size=64, bits=6)
    assert packed_product("affine", 6, x, *six) is None
    assert not multiplies_packed("mxfp4", 4, 32, 128)


@pytest.mark.parametrize(("mode", "bits"), PACKED)
@pytest.mark.parametrize("rows", [1, 4, MOST_ROWS + 6])
def test_a_layer_multiplies_and_has_a_gradient_by_compiled_functions(mode, bits, rows, monkeypatch):
    linear = nn.Linear(128, 96)
    made = (
        NF4Linear.from_linear(linear)
        if mode == "nf4"
        else nn.QuantizedLinear.from_linear(linear, group_size=64, bits=bits)
    )
    model = nn.Sequential(made)
    use_fast_products(model)
    layer = model.layers[0]
    assert type(layer) is (NF4Linear if mode == "nf4" else CPUQuantizedLinear)
    x = normal(rows, 128, seed=1)

    def value(x: mx.array) -> mx.array:
        return mx.sin(layer(x)).sum()

    asked: list[str] = []
    for name in ("packed_product", "unpacked_weights"):
        whole = getattr(products, name)
        monkeypatch.setattr(
            products,
            name,
            lambda *given, name=name, whole=whole: asked.append(name) or whole(*given),
        )
    compiled = layer(x), mx.grad(value)(x)
    assert {*asked} == {"packed_product", "unpacked_weights"}
    for name in ("packed_product", "unpacked_weights"):
        monkeypatch.setattr(products, name, lambda *given: None)
    monkeypatch.setattr(products, "multiplies_packed", lambda *given: False)
    plain = layer(x), mx.grad(value)(x)
    for ours, theirs in zip(compiled, plain, strict=True):
        np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("mode", "bits"), PACKED)
def test_a_broken_scale_breaks_its_own_output_alone(mode, bits):
    """A vector of scales may reach into the next output, whose weights it must not meet."""
    arrays, _ = packed(mode, normal(16, 96), 32, bits)
    x = normal(3, 96, seed=1)
    clean = packed_product(mode, bits, x, *arrays)
    for array in arrays[1:]:
        array[8] = mx.nan
    found = packed_product(mode, bits, x, *arrays)
    others = mx.array([*range(8), *range(9, 16)])
    assert mx.all(mx.isnan(found[:, 8]))
    assert mx.array_equal(found[:, others], clean[:, others])


def test_arrays_that_do_not_fit_together_are_refused_as_mlx_refuses_them():
    model = nn.Sequential(nn.QuantizedLinear(128, 96, bits=4), NF4Linear(normal(96, 128)))
    use_fast_products(model)
    for layer in model.layers:
        assert layer(normal(2, 128)).shape == (2, 96)
        with pytest.raises(ValueError, match="dimension"):
            layer(normal(2, 256))
    codes, scales, biases = mx.quantize(normal(16, 128), group_size=64, bits=4)
    x = normal(2, 128)
    assert packed_product("affine", 4, x, codes, scales) is None
    assert packed_product("affine", 4, x, codes[:8], scales, biases) is None
    assert packed_product("affine", 4, x, codes, scales, biases[:, :1]) is None
    assert unpacked_weights("affine", 4, codes[:, :12], scales, biases) is None
    assert unpacked_weights("nf4", 4, codes, scales, biases) is None


def test_codes_may_begin_at_any_byte():
    codes, scales = pack_nf4(normal(9, 128))
    bytes_before = mx.zeros(codes.size + 3, mx.uint8)
    bytes_before[3:] = codes.flatten()
    mx.eval(bytes_before)
    moved = bytes_before[3:].reshape(codes.shape)
    x = normal(2, 128)
    expected = packed_product("nf4", 4, x, codes, scales)
    assert mx.array_equal(packed_product("nf4", 4, x, moved, scales), expected)
