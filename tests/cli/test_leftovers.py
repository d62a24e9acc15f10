"""A command that is done ends its process, whatever threads and handlers the user's code left."""

import subprocess
import sys
import time

import pytest

PROGRAM = """
import atexit, multiprocessing, subprocess, sys, threading, time
from textpolicy.cli.leftovers import end_soon

def poll():
    while True:
        time.sleep(0.01)

{leftover}
end_soon(7, seconds=0.3)
sys.exit(7)
"""
LEFTOVERS = {
    "threading.Thread(target=poll, name='poll').start()": "thread 'poll' (<string>, line 7)",
    "atexit.register(poll)": "an exit handler (<string>, line 7)",
    "atexit.register(poll); threading.Thread(target=poll, name='a').start()": "thread 'a'",
    "multiprocessing.get_context('fork').Process(target=poll, name='b').start()": "process 'b'",
}


@pytest.mark.parametrize("leftover", LEFTOVERS)
def test_what_was_left_running_is_named_and_the_exit_code_stays(leftover):
    program = PROGRAM.format(leftover=leftover)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 7
    assert LEFTOVERS[leftover] in done.stderr and "Traceback" not in done.stderr


def test_a_process_without_leftovers_ends_at_once():
    program = PROGRAM.format(leftover="").replace("0.3", "20")
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stderr) == (7, "")
    assert time.monotonic() - started < 15
