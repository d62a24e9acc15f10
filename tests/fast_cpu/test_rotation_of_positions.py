"""Heads of many positions are turned by one operation, with angles that layers share."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from tests.fast_cpu.arrays import normal
from textpolicy import fast_cpu
from textpolicy.fast_cpu import rotary
from textpolicy.fast_cpu.model_functions import use_fast_functions
from textpolicy.fast_cpu.rotary import FastRoPE, one_pass

pytestmark = pytest.mark.usefixtures("compiled_operations")

COUNTED = rotary


def fast(rope: nn.RoPE) -> nn.Module:
    model = nn.Sequential(rope)
    use_fast_functions(model)
    assert type(model.layers[0]) is FastRoPE
    return model.layers[0]


def exact(x: mx.array, offset, base: float = 10_000.0, scale: float = 1.0, sign: int = 1):
    """Return the turned heads in float64 by numpy alone."""
    x64 = np.array(x, np.float64)
    half = x.shape[-1] // 2
    first = np.array(offset, np.float64).reshape(-1, 1)
    positions = (first + np.arange(x.shape[2])) * scale
    angle = (positions[..., None] * base ** (-np.arange(half) / half))[:, None]
    cosine, sine = np.cos(angle), sign * np.sin(angle)
    a, b = x64[..., :half], x64[..., half:]
    return np.concatenate([a * cosine - b * sine, b * cosine + a * sine], axis=-1)


@pytest.fixture
def computed(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the arrays of angles whose cosines are computed."""
    shapes: list[tuple[int, ...]] = []
    cosine = mx.cos

    def counted(angle: mx.array) -> mx.array:
        shapes.append(angle.shape)
        return cosine(angle)

    monkeypatch.setattr(mx, "cos", counted)
    return shapes


@pytest.mark.parametrize("offset", [0, 7, "one for all", "one a row"])
@pytest.mark.parametrize(("base", "scale"), [(10_000.0, 1.0), (1e6, 0.25)])
@pytest.mark.parametrize(
    ("rows", "heads", "time", "width"), [(1, 1, 2, 2), (3, 4, 33, 64), (2, 3, 300, 10)]
)
def test_heads_are_turned_as_mlx_does(
    rows, heads, time, width, base, scale, offset, compiled_calls
):
    offset = {
        "one for all": mx.array([5]),
        "one a row": mx.array([3, 0, 40][:rows]),
    }.get(offset, offset)
    x = normal(rows, time, heads, width).transpose(0, 2, 1, 3)
    of_y = normal(rows, heads, time, width, seed=1)
    plain = nn.RoPE(width, base=base, scale=scale)
    rope = fast(nn.RoPE(width, base=base, scale=scale))
    (y,), (gradient,) = mx.vjp(lambda x: [rope(x, offset)], [x], [of_y])
    assert compiled_calls == ["rotation_of_positions"] * 2
    np.testing.assert_allclose(y, exact(x, offset, base, scale), atol=1e-4)
    np.testing.assert_allclose(gradient, exact(of_y, offset, base, scale, -1), atol=1e-4)
    per_row = mx.broadcast_to(mx.array(offset).reshape(-1), (rows,))
    (expected,), (of_x,) = mx.vjp(lambda x: [plain(x, per_row)], [x], [of_y])
    np.testing.assert_allclose(y, expected, atol=1e-4)
    np.testing.assert_allclose(gradient, of_x, atol=1e-4)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2, 3:, :],
        lambda x: x.swapaxes(-1, -2),
        lambda x: x[::-1, :, ::-1, ::-1],
        lambda x: mx.broadcast_to(x[:1, :1], x.shape),
        lambda x: mx.broadcast_to(x[..., :1], x.shape),
    ],
    ids=["with gaps", "transposed", "backwards", "one head", "one number"],
)
def test_heads_are_read_as_they_are_stored(view, compiled_calls):
    x = view(normal(2, 4, 20, 20))
    offset = mx.array([2, 9])
    np.testing.assert_allclose(fast(nn.RoPE(x.shape[-1]))(x, offset), exact(x, offset), atol=1e-5)
    assert compiled_calls == ["rotation_of_positions"]


def test_threads_change_no_bit(threads_restored):
    x, results = normal(2, 8, 100, 64), []
    for threads in (1, 2, 5):
        fast_cpu.set_threads(threads)
        results.append(np.array(FastRoPE(64)(x, 3)))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_what_a_row_gives_does_not_depend_on_the_rows_beside_it():
    rope, x, offset = FastRoPE(64), normal(5, 2, 20, 64), mx.array([3, 1, 4, 1, 5])
    together = np.array(rope(x, offset))
    for row in range(5):
        part = slice(row, row + 1)
        np.testing.assert_array_equal(np.array(rope(x[part], offset[part])), together[part])


@pytest.mark.parametrize("offset", [0, 5, "array"])
def test_layers_of_a_pass_compute_their_angles_once(offset, computed):
    offset = mx.array([3, 8]) if offset == "array" else offset
    queries, keys = normal(2, 4, 20, 64), normal(2, 2, 20, 64, seed=1)
    layers = [FastRoPE(64, base=base) for base in (10_000.0, 10_000.0, 500.0)]
    with one_pass():
        turned = [(layer, layer(x, offset), x) for layer in layers for x in (queries, keys)]
    assert len(computed) == 2
    for layer, found, x in turned:
        np.testing.assert_allclose(found, exact(x, offset, layer.base), atol=1e-4)
    layers[0](queries, offset)
    assert len(computed) == 3


def test_a_pass_has_other_angles_for_another_offset_length_width_or_scale(computed):
    offset = mx.array([3, 8])
    cases = [
        (FastRoPE(64), normal(2, 4, 20, 64), 3),
        (FastRoPE(64), normal(2, 4, 20, 64), 8),
        (FastRoPE(64), normal(2, 4, 20, 64), offset),
        (FastRoPE(64), normal(2, 4, 20, 64), offset + 1),
        (FastRoPE(64), normal(2, 4, 21, 64), 3),
        (FastRoPE(32), normal(2, 4, 20, 32), 3),
        (FastRoPE(64, scale=0.5), normal(2, 4, 20, 64), 3),
    ]
    with one_pass():
        for rope, x, at in cases * 2:
            expected = exact(x, at, scale=rope.scale)
            np.testing.assert_allclose(rope(x, at), expected, atol=1e-4)
    # `offset + 1` is one array in both turns.
    assert len(computed) == 7


def test_arrays_of_positions_that_are_gone_are_not_taken_for_new_ones():
    rope, x = FastRoPE(64), normal(2, 4, 20, 64)
    with one_pass():
        for first in range(20):
            offset = mx.array([first, first + 1])
            np.testing.assert_allclose(rope(x, offset), exact(x, offset), atol=1e-4)
            del offset


def test_a_pass_inside_a_pass_has_its_own_angles(computed):
    rope, x = FastRoPE(64), normal(2, 4, 20, 64)
    with one_pass():
        rope(x, 3)
        with one_pass():
            rope(x, 3)
        rope(x, 3)
    assert len(computed) == 2


@pytest.mark.parametrize(
    ("rope", "x"),
    [
        (nn.RoPE(32), normal(2, 4, 20, 64)),
        (nn.RoPE(64, traditional=True), normal(2, 4, 20, 64)),
        (nn.RoPE(64), normal(2, 4, 20, 64).astype(mx.bfloat16)),
        (nn.RoPE(64), normal(4, 20, 64)),
        (nn.RoPE(64), normal(2, 4, 1, 64)),
    ],
    ids=["part of a head", "neighbours in pairs", "bfloat16", "three axes", "one position"],
)
def test_other_embeddings_stay_as_mlx_computes_them(rope, x, compiled_calls):
    expected = rope(x, offset=3)
    with one_pass():
        assert mx.array_equal(fast(rope)(x, offset=3), expected)
    assert not compiled_calls


@pytest.mark.parametrize(("width", "offset"), [(33, 0), (64, mx.array([1, 2, 3]))])
def test_what_mlx_refuses_is_still_refused(width, offset):
    """An odd width, and positions of more rows than there are."""
    x = normal(2, 4, 20, width)
    for rope in (nn.RoPE(width), FastRoPE(width)):
        with pytest.raises(ValueError):
            mx.eval(rope(x, offset))


def test_without_compiled_operations_the_numbers_are_the_same(monkeypatch, compiled_calls):
    rope, x, offset = FastRoPE(64), normal(2, 4, 20, 64), mx.array([3, 8])
    found = rope(x, offset)
    monkeypatch.setattr(rotary, "operation_for", lambda *_, **__: None)
    np.testing.assert_allclose(rope(x, offset), found, atol=1e-4)
    assert len(compiled_calls) == 1
