"""What the user's code changes in the process of a run is restored, and named."""

import os
import signal
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest

from textpolicy.user_code import keep_process_state, keep_working_directory


def state():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    alarm = signal.getitimer(signal.ITIMER_REAL)[0] > 0
    streams = [sys.stdout, sys.stderr, os.fstat(1), os.fstat(2)]
    streams += [sys.excepthook, threading.excepthook]
    rest = [sys.getrecursionlimit(), list(warnings.filters), np.geterr()]
    return [*handlers, alarm, *streams, *rest]


CHANGES = {
    "the handler of SIGINT": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    "the handler of SIGTERM": lambda: signal.signal(signal.SIGTERM, lambda *_: None),
    "an alarm that was left running": lambda: signal.alarm(50),
    "the handlers of errors that nobody catches": lambda: setattr(sys, "excepthook", None),
    "the recursion limit": lambda: sys.setrecursionlimit(10**6),
    "the filters of warnings": lambda: warnings.simplefilter("ignore"),
    "numpy's handling of floating-point errors": lambda: np.seterr(all="raise"),
    "standard output": lambda: setattr(sys, "stdout", sys.stderr),
    "standard error": lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_undone_and_named(what):
    before = state()
    with keep_process_state() as kept:
        CHANGES[what]()
        assert state() != before
    assert state() == before
    assert kept.changed == [what]


def test_the_users_code_has_a_working_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(keep_working_directory, "users", None)
    own = os.getcwd()
    with keep_process_state() as kept:
        os.chdir(tmp_path)
    assert (os.getcwd(), kept.changed) == (own, ["the working directory"])
    with keep_process_state() as kept:
        assert os.getcwd() == str(tmp_path)
    assert (os.getcwd(), kept.changed) == (own, [])
    (gone := tmp_path / "gone").mkdir()
    with keep_process_state():
        os.chdir(gone)
        gone.rmdir()
    assert os.getcwd() == own
    with keep_process_state():
        pass
    assert os.getcwd() == own


def test_nothing_is_named_where_nothing_was_changed():
    descriptors = len(os.listdir("/dev/fd"))
    for _ in range(3):
        with keep_process_state() as kept:
            signal.signal(signal.SIGINT, signal.getsignal(signal.SIGINT))
        assert kept.changed == []
    assert len(os.listdir("/dev/fd")) == descriptors


def test_streams_that_were_closed_are_open_again():
    program = (
        "import os, sys\n"
        "from textpolicy.user_code import keep_process_state\n"
        "with keep_process_state():\n"
        "    sys.stdout.close(); sys.stderr.close(); os.closerange(1, 3)\n"
        "print('said'); print('warned', file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("said\n", "warned\n", 0)


def test_of_blocks_that_overlap_in_threads_the_last_restores_what_was_before_the_first(tmp_path):
    before = state()
    descriptors = len(os.listdir("/dev/fd"))
    entered, may_leave = threading.Event(), threading.Event()

    def other() -> None:
        with keep_process_state():
            entered.set()
            may_leave.wait()
            assert sys.stdout is sys.stderr

    thread = threading.Thread(target=other)
    with keep_process_state() as kept:
        thread.start()
        entered.wait()
        sys.stdout = sys.stderr
        with keep_process_state():
            sys.setrecursionlimit(10**6)
    assert kept.changed == [] and state() != before
    may_leave.set()
    thread.join()
    assert state() == before
    assert len(os.listdir("/dev/fd")) == descriptors
    with keep_process_state() as kept:
        warnings.simplefilter("ignore")
    assert kept.changed == ["the filters of warnings"]


@pytest.mark.parametrize("first", ["main", "worker"])
@pytest.mark.parametrize("what", [*CHANGES][:3])
def test_the_main_thread_restores_signals_while_a_block_of_another_thread_hangs(first, what):
    before = state()
    entered, may_leave = threading.Event(), threading.Event()

    def hang() -> None:
        with keep_process_state():
            entered.set()
            may_leave.wait()

    def start() -> None:
        worker.start()
        entered.wait()

    worker = threading.Thread(target=hang)
    if first == "worker":
        start()
    with keep_process_state() as kept:
        if first == "main":
            start()
        CHANGES[what]()
    restored, named = state(), kept.changed
    may_leave.set()
    worker.join()
    assert restored == before and named == [what]
