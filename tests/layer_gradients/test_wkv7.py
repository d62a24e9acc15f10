"""The recurrence of RWKV-7 has the values and the gradients of mlx-lm's."""

import mlx.core as mx
import pytest
from mlx_lm.models import rwkv7

from textpolicy.layer_gradients.wkv7 import wkv7


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("time", [1, 32, 70])
def test_the_values_and_gradients_are_those_of_mlx_lm(time, with_state):
    args = rwkv7.ModelArgs("rwkv7", 8, 64, 64, 1e-5, 32, 1, 8, 8, 8, 8)
    layer = rwkv7.Rwkv7TimeMixing(args, 0)
    keys = mx.random.split(mx.random.key(0), 7)
    *arrays, state = (mx.random.normal((2, time, 2, 32), key=key) / 6 for key in keys)
    arrays[1] = mx.exp(-mx.exp(arrays[1] - 1))
    state = state[:, :1, :, :, None] * state[:, :1, :, None, :]
    inputs = [*arrays, *([state.squeeze(1)] if with_state else [])]

    def total(function):
        def weighted(*inputs):
            y, last = function(*inputs, *([] if with_state else [None]))
            # mlx-lm's loop, unlike its kernel, returns an axis more.
            y = y.reshape(2, time, 2, 32)
            return (y * mx.cos(mx.arange(32))).sum() + (last * mx.sin(mx.arange(32))).sum()

        return mx.value_and_grad(weighted, argnums=[*range(len(inputs))])(*inputs)

    (value, found), (expected, wanted) = total(lambda *x: wkv7(layer, *x)), total(layer._wkv7)
    assert abs(value - expected) < 1e-5 * abs(expected)
    for x, y in zip(found, wanted, strict=True):
        assert mx.abs(x - y).max() <= 1e-5 * mx.abs(y).max()
