"""What several tests of fast products and functions need."""

import mlx.core as mx
import pytest

from textpolicy.fast_cpu.mlx_operations import reason_of_none


@pytest.fixture
def compiled_operations() -> None:
    """Skip the test where mlx computes nothing by compiled functions."""
    if mx.default_device().type != mx.cpu:
        pytest.skip("the compiled functions are for CPUs")
    if reason := reason_of_none():
        pytest.skip(reason)
