"""Calls that wait run side by side in threads; other calls run at once, in the caller's thread."""

import threading
import time

import pytest

from textpolicy.user_code import WaitingCalls
from textpolicy.user_code.waiting_calls import MAX_THREADS


def compute(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def waiting() -> WaitingCalls:
    """Return an object whose last calls have waited."""
    calls = WaitingCalls()
    while not calls.wait:
        assert calls.start(time.sleep, 0.04).done()
    return calls


def test_quick_calls_run_at_once_in_the_caller_s_thread():
    calls = WaitingCalls()
    for _ in range(5):
        future = calls.start(in_main_thread)
        assert future.done() and future.result()


def test_calls_that_compute_for_long_run_at_once_too():
    calls = WaitingCalls()
    for _ in range(5):
        assert calls.start(compute, 0.05).done()
    assert calls.start(in_main_thread).result()


def test_calls_wait_in_threads_once_the_last_three_have_waited():
    calls = waiting()
    started = time.monotonic()
    futures = [calls.start(time.sleep, 0.2) for _ in range(20)]
    assert not any(future.done() for future in futures)
    assert [future.result() for future in futures] == [None] * 20
    assert time.monotonic() - started < 20 * 0.2 / 2


def test_calls_that_become_quick_run_in_the_caller_s_thread_again():
    calls = waiting()
    assert not calls.start(in_main_thread).result()
    assert calls.start(in_main_thread).result()


def test_no_more_calls_wait_at_the_same_time_than_there_are_threads():
    calls, gate, lock, inside, most = waiting(), threading.Event(), threading.Lock(), [0], [0]

    def call() -> None:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        gate.wait()
        with lock:
            inside[0] -= 1

    futures = [calls.start(call) for _ in range(2 * MAX_THREADS)]
    while most[0] < MAX_THREADS:
        time.sleep(0.001)
    gate.set()
    for future in futures:
        future.result()
    assert most == [MAX_THREADS]


@pytest.mark.parametrize("make", [WaitingCalls, waiting])
def test_the_error_of_a_call_is_raised_where_its_result_is_read(make):
    future = make().start(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        future.result()


def test_dropped_calls_never_begin():
    calls, begun, release = waiting(), [], threading.Event()

    def hold(number: int) -> None:
        begun.append(number)
        release.wait(10)

    futures = [calls.start(hold, number) for number in range(MAX_THREADS + 5)]
    calls.drop()
    release.set()
    for future in futures[:MAX_THREADS]:
        future.result(10)
    time.sleep(0.05)
    assert sorted(begun) == [*range(MAX_THREADS)]
