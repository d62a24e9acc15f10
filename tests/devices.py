"""Tests of one kind of device, and work that keeps any device busy."""

from functools import partial

import mlx.core as mx
import pytest

from tests.timing import least_seconds


def only_on_a_cpu(reason: str) -> pytest.MarkDecorator:
    """Return a mark that skips a test where mlx computes on a GPU."""
    return pytest.mark.skipif(mx.default_device().type != mx.cpu, reason=reason)


def launch_long_work() -> mx.array:
    """Return an array that the device computes now, for half a second or longer.

    A faster device gets larger matrices, not more products: `mx.async_eval` waits while more than
    a few launches have not ended.
    """
    size, seconds = 600, 0.0
    square = mx.array(0.0)
    while seconds < 0.05:
        size *= 2
        square = mx.random.normal((size, size))
        mx.eval(square)
        seconds = least_seconds(partial(_multiply, square), below=0.05)
    work = square
    for _ in range(15):
        work = mx.softmax(work @ square)
    mx.async_eval(work)
    return work


def _multiply(square: mx.array) -> None:
    mx.eval(mx.softmax(square @ square))
