"""The process in which tools run that have a time limit."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from textpolicy.environments.request_process import RequestProcess, tool_process

THREADS, LIMITS = 8, [1000.0 + number for number in range(400)]


@pytest.fixture
def hasty_threads():
    """Let Python change between threads as often as it can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_tools_of_all_threads_with_one_time_limit_share_one_process(hasty_threads):
    ready = threading.Barrier(THREADS)

    def processes(number: int) -> list[RequestProcess]:
        found: list[RequestProcess] = []
        for seconds in LIMITS:
            ready.wait()
            found.append(tool_process(seconds))
        return found

    with ThreadPoolExecutor(THREADS) as threads:
        first, *others = threads.map(processes, range(THREADS))
    assert all(one is other for found in others for one, other in zip(first, found, strict=True))
    assert len(set(map(id, first))) == len(LIMITS)
