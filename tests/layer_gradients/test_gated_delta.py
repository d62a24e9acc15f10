"""The gated delta rule in chunks has the values and the gradients of the step-by-step rule."""

import inspect

import mlx.core as mx
import pytest
from mlx_lm.models import gated_delta

from tests.memory import peak_of
from tests.quick import quick_first
from textpolicy.layer_gradients.gated_delta import gated_delta_in_chunks, gated_delta_update

NAMES = ["q", "k", "v", "log_decay", "beta", "state"]


def inputs(time, *, vector=False, key_heads=2, decay=-2.0, seed=0):
    """Return random inputs of two rows, four heads, 32 key and 16 value dimensions."""
    q, k, v, log_decay, beta, state = (
        mx.random.normal(shape, key=key)
        for shape, key in zip(
            [(2, time, key_heads, 32)] * 2
            + [(2, time, 4, 16), (2, time, 4, 32) if vector else (2, time, 4)]
            + [(2, time, 4), (2, 4, 16, 32)],
            mx.random.split(mx.random.key(seed), 6),
            strict=True,
        )
    )
    q, k = gated_delta.normalize_qk(q, k, inv_scale=32**-0.5, eps=1e-6)
    return [q, k, v, -mx.exp(2 * log_decay + decay), mx.sigmoid(3 * beta), state]


def step_by_step(mask):
    """Return mlx-lm's own loop over time as a function of the same inputs."""
    return lambda q, k, v, log_decay, beta, state: gated_delta.gated_delta_ops(
        q, k, v, mx.exp(log_decay), beta, state, mask
    )


def in_chunks(mask):
    return lambda *arrays: gated_delta_in_chunks(*arrays, mask)


def values_and_gradients(function, arrays, mask):
    """Return outputs, the last state, and the gradients of a weighted sum of both."""

    def results(*arrays):
        y, state = function(*arrays)
        return (y if mask is None else mx.where(mask[..., None, None], y, 0)), state

    weights = [mx.random.normal(x.shape, key=mx.random.key(9)) for x in (arrays[2], arrays[5])]

    def total(*arrays):
        return sum((x * w).sum() for x, w in zip(results(*arrays), weights, strict=True))

    return [*results(*arrays), *mx.grad(total, argnums=[*range(6)])(*arrays)]


def assert_equal(found, expected):
    for name, x, y in zip(["y", "last state", *NAMES], found, expected, strict=True):
        assert float(mx.abs(x - y).max()) < 1e-5 * float(mx.abs(y).max()), name


@pytest.mark.parametrize("vector", [False, True], ids=["decay of heads", "decay of dimensions"])
@pytest.mark.parametrize("masked", [False, True], ids=["all steps", "some steps"])
@pytest.mark.parametrize(("time", "key_heads"), [(1, 4), (16, 2), (64, 1), (70, 2), (131, 4)])
def test_chunks_have_the_values_and_gradients_of_single_steps(vector, masked, time, key_heads):
    arrays = inputs(time, vector=vector, key_heads=key_heads)
    mask = mx.random.uniform(shape=(2, time)) > 0.3 if masked else None
    found = values_and_gradients(in_chunks(mask), arrays, mask)
    assert_equal(found, values_and_gradients(step_by_step(mask), arrays, mask))


@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize(("decay", "scale"), [(-20.0, 1.0), (2.0, 1.0), (-2.0, 2.0)])
def test_decays_may_be_one_or_vanish_and_rates_may_reach_two(vector, decay, scale):
    arrays = inputs(70, vector=vector, decay=decay)
    arrays[4] = scale * arrays[4]
    found = values_and_gradients(in_chunks(None), arrays, None)
    assert_equal(found, values_and_gradients(step_by_step(None), arrays, None))


def test_a_decay_that_underflows_to_zero_has_a_finite_gradient():
    arrays = inputs(70)
    arrays[3] = mx.where(mx.arange(70)[None, :, None] % 7 == 3, -1e4, arrays[3])
    found = values_and_gradients(in_chunks(None), arrays, None)
    assert all(bool(mx.isfinite(x).all()) for x in found)
    expected = values_and_gradients(step_by_step(None), arrays, None)
    assert_equal(found, expected)


def test_a_key_that_repeats_keeps_its_precision():
    """Powers of the matrix, in place of substitution, would lose all digits here."""
    arrays = inputs(64)
    arrays[1] = mx.broadcast_to(arrays[1][:, :1], arrays[1].shape)
    arrays[3], arrays[4] = mx.full((2, 64, 4), -1e-4), mx.full((2, 64, 4), 0.999)
    found = values_and_gradients(in_chunks(None), arrays, None)
    assert_equal(found, values_and_gradients(step_by_step(None), arrays, None))


@pytest.mark.parametrize(
    "options", [{}, {"lower_bound": -5.0}, {"allow_neg_eigval": True}], ids=str
)
def test_the_whole_function_is_that_of_mlx_lm(options):
    q, k, v, a, b, _ = inputs(70)
    a_log, dt_bias = mx.array([-2.0, 0.0, 1.0, 3.0]), mx.array([1.0, -1.0, 0.5, 0.0])
    arrays = q, k, v, a, b, a_log, dt_bias

    def total(update):
        def weighted(*arrays):
            y, state = update(*arrays, use_kernel=False, **options)
            return (y * mx.cos(mx.arange(16))).sum() + (state * mx.sin(mx.arange(32))).sum()

        return mx.value_and_grad(weighted, argnums=[*range(7)])(*arrays)

    (value, found), (expected, wanted) = map(
        total, [gated_delta_update, gated_delta.gated_delta_update]
    )
    assert abs(value - expected) < 1e-5 * abs(expected)
    for x, y in zip(found, wanted, strict=True):
        assert mx.abs(x - y).max() < 1e-5 * mx.abs(y).max()


def test_the_options_are_those_of_mlx_lm():
    ours, theirs = map(inspect.signature, [gated_delta_update, gated_delta.gated_delta_update])
    assert [*ours.parameters] == [*theirs.parameters]
    assert [p.default for p in ours.parameters.values()] == [
        p.default for p in theirs.parameters.values()
    ]


def test_half_precision_is_computed_in_float32_and_returned_as_it_came():
    arrays = inputs(40)
    half = [x.astype(mx.bfloat16) for x in arrays[:3]]
    y, state = gated_delta_in_chunks(*half, *arrays[3:])
    expected, last = gated_delta_in_chunks(*[x.astype(mx.float32) for x in half], *arrays[3:])
    assert y.dtype == mx.bfloat16 and state.dtype == mx.float32
    assert mx.array_equal(y, expected.astype(mx.bfloat16)) and mx.array_equal(state, last)


@pytest.mark.parametrize("vector", quick_first(1, [False, True]))
def test_memory_grows_with_length_and_not_faster(vector):
    def peak(time):
        arrays = inputs(time, vector=vector)
        mx.eval(arrays)
        total = lambda *arrays: gated_delta_in_chunks(*arrays)[0].square().sum()  # noqa: E731
        return peak_of(lambda: mx.eval(mx.grad(total, argnums=[*range(6)])(*arrays)))

    peak(256)
    assert peak(1024) < 4.5 * peak(256)
