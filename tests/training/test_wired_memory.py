"""keep_memory_wired: Metal's wired limit during a run."""

import mlx.core as mx
import pytest

from textpolicy.training.wired_memory import keep_memory_wired


def test_a_run_leaves_the_wired_limit_as_it_was():
    before = mx.set_wired_limit(0)
    mx.set_wired_limit(before)
    with keep_memory_wired():
        assert mx.square(mx.array(3.0)).item() == 9
    assert mx.set_wired_limit(before) == before


@pytest.mark.metal
@pytest.mark.skipif(not mx.metal.is_available(), reason="needs an Apple GPU")
def test_inside_a_run_the_device_keeps_what_it_recommends():
    with keep_memory_wired():
        limit = mx.device_info()["max_recommended_working_set_size"]
        assert mx.set_wired_limit(limit) == limit
