"""Angles that all layers of a step share give what each layer computes alone."""

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.rope_utils import Llama3RoPE, YarnRoPE

from tests.devices import only_on_a_cpu
from textpolicy.fast_cpu.gradients import without_gradients
from textpolicy.fast_cpu.model_functions import use_fast_functions
from textpolicy.fast_cpu.rotary import FastRoPE, FastRotation, next_positions, one_pass, one_step

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


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
STRETCHED: dict[str, Callable[..., Any]] = {
    "llama3": lambda dims=64, **options: Llama3RoPE(dims, scaling_config=LLAMA3, **options),
    "llama3 of another base": lambda dims=64, **options: Llama3RoPE(
        dims, base=5e5, scaling_config=LLAMA3 | {"factor": 32.0}, **options
    ),
    "yarn": lambda dims=64, **options: YarnRoPE(
        dims, original_max_position_embeddings=64, scaling_factor=4.0, **options
    ),
    "yarn of heads as they are": lambda dims=64, **options: YarnRoPE(
        dims, scaling_factor=4.0, mscale_all_dim=1, **options
    ),
    "yarn of larger heads": lambda dims=64, **options: YarnRoPE(
        dims, original_max_position_embeddings=64, scaling_factor=40.0, mscale=3.0, **options
    ),
}
stretched = pytest.mark.parametrize("kind", STRETCHED)


def heads(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(7))


@cpu
def test_yarn_scales_heads():
    scales = [STRETCHED[kind]().mscale for kind in STRETCHED if "yarn" in kind]
    assert scales[1] == 1 and scales[0] > 1.1 and scales[2] > 2


@cpu
@stretched
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("width", [2, 64, 96])
def test_stretched_embeddings_turn_as_in_mlx_lm_in_a_step(kind, compiled, width):
    plain, rope, offset = (
        STRETCHED[kind](width),
        fast(STRETCHED[kind](width)),
        mx.array([5, 0, 999]),
    )
    assert isinstance(rope, FastRotation)
    x = heads(3, 4, 1, width)
    with one_step([offset]), without_gradients() if compiled else nullcontext():
        # Angles of float32 numbers near a thousand are rounded.
        np.testing.assert_allclose(rope(x, offset), plain(x, offset), rtol=1e-4, atol=3e-4)


@cpu
@stretched
@pytest.mark.parametrize("time", [1, 2, 9])
@pytest.mark.parametrize("offset", [0, 3, mx.array(3), mx.array([5, 0, 200])], ids=str)
def test_stretched_embeddings_turn_as_in_mlx_lm_in_a_prompt(kind, time, offset):
    plain, rope, x = STRETCHED[kind](), fast(STRETCHED[kind]()), heads(3, 4, time, 64)
    for where in (nullcontext(), one_pass(), without_gradients()):
        with where:
            for _ in range(2):
                found = rope(x, offset)
                np.testing.assert_allclose(found, plain(x, offset), rtol=1e-4, atol=1e-4)


@cpu
@stretched
@pytest.mark.parametrize("time", [1, 6])
def test_stretched_embeddings_have_the_gradient_of_mlx_lm(kind, time):
    plain, rope, offset = STRETCHED[kind](), fast(STRETCHED[kind]()), mx.array([3, 90])
    x, weights = heads(2, 4, time, 64), mx.random.normal((2, 4, time, 64))

    def gradient(layer: nn.Module) -> mx.array:
        return mx.grad(lambda x: (mx.sin(layer(x, offset)) * weights).sum())(x)

    with one_step([offset] if time == 1 else []):
        np.testing.assert_allclose(gradient(rope), gradient(plain), rtol=1e-4, atol=1e-4)


@cpu
@stretched
@pytest.mark.parametrize("time", [1, 6])
@pytest.mark.parametrize("case", ["half precision", "pairs", "part of a head"])
def test_other_heads_are_turned_by_mlx_lm_itself(kind, time, case):
    options = {"traditional": case == "pairs", "dims": 32 if case == "part of a head" else 64}
    plain, rope = STRETCHED[kind](**options), fast(STRETCHED[kind](**options))
    x, offset = heads(2, 4, time, 64), mx.array([3, 9])
    if case == "half precision":
        x = x.astype(mx.bfloat16)
    with one_step([offset] if time == 1 else []), without_gradients():
        found = rope(x, offset)
    assert found.dtype == x.dtype
    assert mx.array_equal(found, plain(x, offset))


@cpu
@pytest.mark.parametrize("options", [{"inverse": True}, {"scale": 0.5}], ids=str)
def test_other_options_of_yarn_are_those_of_mlx_lm(options):
    plain, rope = STRETCHED["yarn"](), fast(STRETCHED["yarn"]())
    x, offset = heads(2, 4, 1, 64), mx.array([3, 9])
    with one_step([offset]), without_gradients():
        assert mx.array_equal(rope(x, offset, **options), plain(x, offset, **options))


@cpu
@stretched
def test_a_stretched_embedding_can_be_copied_and_written_to_a_file(kind):
    rope, offset, x = fast(STRETCHED[kind]()), mx.array([3, 9]), heads(2, 4, 1, 64)
    with one_step([offset]):
        expected = rope(x, offset)
        for other in (copy.deepcopy(rope), pickle.loads(pickle.dumps(rope))):
            assert type(other) is type(rope)
            assert mx.array_equal(other(x, offset), expected)


@cpu
def test_layers_that_turn_differently_share_no_angles_in_a_step():
    makes = [lambda: nn.RoPE(64), lambda: nn.RoPE(64, base=500.0), lambda: nn.RoPE(64, scale=0.5)]
    makes += [*STRETCHED.values()]
    offset, x = mx.array([3, 90]), heads(2, 4, 1, 64)
    with one_step([offset]), without_gradients():
        for layer, plain in [(fast(make()), make()) for make in makes] * 2:
            np.testing.assert_allclose(layer(x, offset), plain(x, offset), rtol=1e-4, atol=1e-4)


@cpu
def test_layers_that_turn_differently_share_no_angles_in_a_pass():
    offset, x = mx.array([3, 90]), heads(2, 4, 5, 64)
    with one_pass(), without_gradients():
        for layer, plain in [(fast(make()), make()) for make in STRETCHED.values()] * 2:
            np.testing.assert_allclose(layer(x, offset), plain(x, offset), rtol=1e-4, atol=1e-4)


@cpu
@stretched
def test_equal_stretched_layers_compute_the_angles_of_a_step_once(kind, monkeypatch):
    computed: list[mx.array] = []
    cosine = mx.cos
    monkeypatch.setattr(mx, "cos", lambda angle: computed.append(angle) or cosine(angle))
    model, offset = nn.Sequential(*(STRETCHED[kind]() for _ in range(3))), mx.array([3, 9])
    use_fast_functions(model)
    layers = model.layers
    with one_step([offset]):
        for layer in layers:
            layer(heads(2, 4, 1, 64), offset)
    assert len(computed) == 1


@cpu
@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_a_layer_turns_by_the_periods_that_it_has_now(kind):
    """Another layer with the old periods is in the same step."""
    first, second = fast(STRETCHED[kind]()), fast(STRETCHED[kind]())
    plain, offset, x = STRETCHED[kind](), mx.array([3, 90]), heads(2, 4, 1, 64)
    with one_step([offset]):
        first(x, offset), second(x, offset)
    plain._freqs = second._freqs = 3 * second._freqs
    with one_step([offset]):
        first(x, offset)
        np.testing.assert_allclose(second(x, offset), plain(x, offset), rtol=1e-4, atol=1e-4)


@cpu
@stretched
@pytest.mark.parametrize("time", [1, 5])
def test_a_compiled_function_may_take_the_periods_as_an_input(kind, time):
    """`mx.compile` gives a model's state to a function as arrays without numbers."""
    rope, plain, x = fast(STRETCHED[kind]()), STRETCHED[kind](), heads(2, 4, time, 64)
    compiled = mx.compile(lambda x: rope(x, 7), inputs=[rope.state])
    np.testing.assert_allclose(compiled(x), plain(x, 7), rtol=1e-4, atol=1e-4)


@cpu
def test_each_layer_has_an_array_of_next_positions_that_nobody_else_changes():
    offsets = [mx.array([3, 9]) for _ in range(3)]
    with one_step(offsets):
        first, second, third = (next_positions(offset) for offset in offsets)
        other = next_positions(mx.array([7, 8]))
    first += 5
    second[0] = 77
    mx.eval(first, second)
    found = [one.tolist() for one in (first, second, third, other)]
    assert found == [[9, 15], [77, 10], [4, 10], [8, 9]]
    assert [one.tolist() for one in offsets] == [[3, 9]] * 3


def test_next_positions_outside_a_step_are_computed_from_the_array():
    assert next_positions(mx.array([3, 9])).tolist() == [4, 10]
    with one_step([]):
        assert next_positions(mx.array([3, 9])).tolist() == [4, 10]
