"""What several tests of fast products and functions need."""

import mlx.core as mx
import pytest

from textpolicy import fast_cpu
from textpolicy.fast_cpu.mlx_operations import reason_of_none


@pytest.fixture
def compiled_operations() -> None:
    """Skip the test where mlx computes nothing by compiled functions."""
    if mx.default_device().type != mx.cpu:
        pytest.skip("the compiled functions are for CPUs")
    if reason := reason_of_none():
        pytest.skip(reason)


@pytest.fixture
def compiled_calls(request, monkeypatch) -> list[str]:
    """The names of the compiled operations that a module asks for: `COUNTED` of the test's file."""
    asked: list[str] = []
    make = request.module.COUNTED.compiled_operation

    def counted(name: str, *args: int, **options: bool):
        asked.append(name)
        return make(name, *args, **options)

    monkeypatch.setattr(request.module.COUNTED, "compiled_operation", counted)
    return asked


@pytest.fixture
def threads_restored():
    """Let the test change the number of threads."""
    before = fast_cpu.enable().threads
    assert before is not None
    yield
    fast_cpu.set_threads(before)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request, threads_restored) -> int:
    """Compute with each of these numbers of threads."""
    fast_cpu.set_threads(request.param)
    return request.param
