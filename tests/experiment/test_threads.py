"""On a busy machine a command says what to type, if one thread is faster than several."""

import os
import sys

import pytest

from textpolicy import fast_cpu
from textpolicy.config.train import ModelOptions
from textpolicy.experiment.threads import ONE_IS_FASTER, thread_advice
from textpolicy.fast_cpu import ThreadSpeeds

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="OpenBLAS is used on Linux only")


@pytest.mark.parametrize(
    ("load", "with_one", "options", "is_said"),
    [
        (3.0, 26.5, ModelOptions(name="folder"), True),
        (3.0, 17.0, ModelOptions(name="folder"), False),
        (0.2, 26.5, ModelOptions(name="folder"), False),
        (3.0, 26.5, ModelOptions(name="folder", threads=2), False),
        (3.0, 26.5, ModelOptions(name="tiny"), False),
    ],
)
def test_advice_is_given_if_the_machine_is_busy_and_one_thread_is_faster(
    monkeypatch, load, with_one, options, is_said
):
    speeds = ThreadSpeeds(of_a_run=2, gflops=19.0, gflops_of_one=with_one)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(fast_cpu, "measure_threads", lambda: speeds)
    advice = thread_advice(options)
    assert thread_advice(options, workers=1) is None
    assert (advice is not None) is is_said
    assert not advice or advice == f"{ONE_IS_FASTER} (26.5 GFLOP/s, and 19.0 with 2 threads)"


def test_measuring_the_threads_leaves_their_number_as_it_was():
    before = fast_cpu.enable().threads
    speeds = fast_cpu.measure_threads()
    assert fast_cpu.enable().threads == before
    assert speeds is None or (speeds.gflops > 0 and speeds.gflops_of_one > 0)
