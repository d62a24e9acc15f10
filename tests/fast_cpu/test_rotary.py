"""Angles that all layers of a step share give what each layer computes alone."""

from contextlib import nullcontext

import mlx.core as mx
import mlx.nn as nn
import pytest

from tests.devices import only_on_a_cpu
from textpolicy.fast_cpu.gradients import without_gradients
from textpolicy.fast_cpu.model_functions import use_fast_functions
from textpolicy.fast_cpu.rotary import FastRoPE, one_step

cpu = only_on_a_cpu("a GPU keeps mlx's rotary embeddings")


def fast(rope: nn.Module) -> nn.Module:
    model = nn.Sequential(rope)
    use_fast_functions(model)
    return model.layers[0]


@pytest.mark.parametrize("base", [10_000.0, 1e6])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("compiled", [True, False])
def test_shared_angles_rotate_as_mlx_does(base, scale, compiled):
    """Compiled operations have no gradient, so they rotate only where none is needed."""
    rope = fast(nn.RoPE(64, base=base, scale=scale))
    x = mx.random.normal((3, 4, 1, 64))
    queries, keys = mx.array([5, 0, 4000]), mx.array([5, 0, 4000])
    with one_step([queries, keys]), without_gradients() if compiled else nullcontext():
        for offset in (queries, keys):
            expected = nn.RoPE(64, base=base, scale=scale)(x, offset)
            assert mx.allclose(rope(x, offset), expected, rtol=1e-5, atol=1e-5)


@cpu
def test_layers_of_a_step_compute_their_angles_once(monkeypatch):
    computed: list[tuple[int, ...]] = []
    cosine = mx.cos

    def counted(angle: mx.array) -> mx.array:
        computed.append(angle.shape)
        return cosine(angle)

    monkeypatch.setattr(mx, "cos", counted)
    x, offset = mx.random.normal((2, 4, 1, 64)), mx.array([3, 9])
    layers = [fast(nn.RoPE(64, base=base)) for base in (10_000.0, 10_000.0, 500.0)]
    for _ in range(2):
        with one_step([offset]):
            for layer in layers:
                layer(x, offset)
                layer(x, offset)
    assert len(computed) == 4


@pytest.mark.parametrize(
    ("rope", "width"),
    [(nn.RoPE(32), 64), (nn.RoPE(64, traditional=True), 64)],
    ids=["part of a head", "neighbours in pairs"],
)
def test_other_embeddings_stay_as_mlx_computes_them(rope, width):
    x, offset = mx.random.normal((2, 4, 1, width)), mx.array([3, 9])
    expected = rope(x, offset)
    with one_step([offset]):
        assert mx.array_equal(fast(rope)(x, offset), expected)


@cpu
def test_positions_that_are_not_those_of_the_step_are_computed_anew():
    rope, x, offset = fast(nn.RoPE(64)), mx.random.normal((2, 4, 1, 64)), mx.array([3, 9])
    assert isinstance(rope, FastRoPE)
    later = offset + 1
    with one_step([offset]):
        assert mx.array_equal(rope(x, later), nn.RoPE(64)(x, later))
        assert mx.array_equal(rope(x, 7), nn.RoPE(64)(x, 7))


def test_angles_of_a_step_have_a_gradient_where_one_is_needed():
    rope, x, offset = nn.RoPE(64), mx.random.normal((2, 4, 1, 64)), mx.array([3, 9])
    weights = mx.random.normal(x.shape)
    expected = mx.grad(lambda x: (rope(x, offset) * weights).sum())(x)
    with one_step([offset]):
        found = mx.grad(lambda x: (fast(rope)(x, offset) * weights).sum())(x)
    assert mx.allclose(found, expected, rtol=1e-5, atol=1e-5)
