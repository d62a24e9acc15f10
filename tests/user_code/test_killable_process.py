"""A process for the user's code ends with everything that it has started, however it escapes."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.connection import wait

import pytest

from textpolicy.user_code.killable_process import ForgedAnswerError, KillableProcess

linux = pytest.mark.skipif(
    sys.platform != "linux", reason="macOS cannot find a process whose parent has ended"
)
# Each starts a process that runs `sleep 1000.MARK`, and returns while that process runs.
SLEEPER = """
import os, signal, subprocess, sys, threading, time
def sleep():
    os.execvp("sleep", ["sleep", MARK])
"""
ESCAPES = {
    "a child": "subprocess.Popen(['sleep', MARK])",
    "a session of its own": "subprocess.Popen(['sleep', MARK], start_new_session=True)",
    "a double fork": "if not os.fork():\n if os.fork(): os._exit(0)\n sleep()",
    "a daemon": "if not os.fork():\n os.setsid()\n if os.fork(): os._exit(0)\n sleep()",
    "a daemon without its environment": (
        "if not os.fork():\n os.setsid()\n if os.fork(): os._exit(0)\n"
        " os.execve('/bin/sleep', ['sleep', MARK], {})"
    ),
    "a daemon that ignores signals": (
        "if not os.fork():\n os.setsid()\n for s in (1, 2, 15): signal.signal(s, signal.SIG_IGN)\n"
        " sleep()"
    ),
    "a stopped daemon": (
        "if not os.fork():\n os.setsid()\n"
        " if not os.fork(): sleep()\n os.kill(os.getpid(), signal.SIGSTOP)"
    ),
    "a daemon that holds all its files": (
        "if not os.fork():\n os.setsid()\n"
        " for f in range(3, 64):\n  try: os.set_inheritable(f, True)\n  except OSError: pass\n"
        " sleep()"
    ),
    "children of a thread": (
        "threading.Thread(target=subprocess.run, args=(['sleep', MARK],),"
        " kwargs={'start_new_session': True}, daemon=True).start()"
    ),
}
ENDINGS = {
    "is killed": "parent.send(at=1); time.sleep(60)",
    "exits": "parent.send(at=1); os._exit(3)",
    "crashes": "parent.send(at=1); import ctypes; ctypes.string_at(0)",
    "hangs in C": "parent.send(at=1); import re; re.fullmatch('(a+)+', 'a' * 60 + 'b')",
    "stops its guard": "os.kill(os.getppid(), signal.SIGSTOP); parent.send(at=1); time.sleep(60)",
    "stops itself": "parent.send(at=1); os.kill(os.getpid(), signal.SIGSTOP)",
    "kills its group": "parent.send(at=1); os.killpg(0, signal.SIGKILL)",
}


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Return a function that starts a process which runs these lines, with `parent` in scope."""
    monkeypatch.syspath_prepend(tmp_path)
    started = []

    def run(body, mark="0"):
        lines = "\n    ".join(body.splitlines())
        name = f"program_{len(started)}"
        text = f"MARK = {mark!r}\n{SLEEPER}\ndef main(parent):\n    {lines}\n"
        (tmp_path / f"{name}.py").write_text(text, "utf-8")
        started.append(KillableProcess(f"{name}:main"))
        return started[-1]

    yield run
    for process in started:
        process.kill()


def messages_of(process, seconds=20.0):
    """Return the first messages that arrive."""
    found, deadline = [], time.monotonic() + seconds
    with suppress(EOFError):
        while not found and time.monotonic() < deadline:
            wait([process.socket], 1)
            for message in process.read_messages():
                found.append(message)
    return found


def running(mark):
    """Return the ids of the processes with this mark, zombies left out."""
    shown = subprocess.run(["ps", "-wwAo", "pid=,stat=,args="], capture_output=True, text=True)
    lines = [line.split(maxsplit=2) for line in shown.stdout.splitlines()]
    return [int(pid) for pid, state, args in lines if mark in args and state[0] != "Z"]


def all_processes():
    shown = subprocess.run(["ps", "-Ao", "pid="], capture_output=True, text=True)
    return shown.stdout.split()


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


@linux
@pytest.mark.slow
@pytest.mark.proves("S5")
def test_whatever_a_process_starts_ends_with_it_however_it_ends(start, attempts):
    for number, escape in enumerate(ESCAPES):
        for ending, how in list(ENDINGS.items())[number % 2 :: 2]:
            mark = f"{1000 + os.getpid()}.{number}"
            process = start(f"{ESCAPES[escape]}\ntime.sleep(0.05)\n{how}", mark)
            assert messages_of(process) == [{"at": 1}], (escape, ending)
            process.kill()
            left = running(f"sleep {mark}")
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            assert not left, (escape, ending)
            attempts.add()


@linux
@pytest.mark.parametrize("escape", ["a child", "a daemon", "a daemon without its environment"])
def test_an_escaped_process_ends_when_the_process_itself_has_ended(start, escape):
    mark = f"{2000 + os.getpid()}.5"
    process = start(f"{ESCAPES[escape]}\ntime.sleep(0.1)\nparent.send(at=1)", mark)
    assert messages_of(process) == [{"at": 1}]
    assert wait_until(lambda: not running(f"sleep {mark}"))


@linux
@pytest.mark.proves("S5")
@pytest.mark.parametrize("escape", ["a child", "a daemon", "a stopped daemon"])
def test_no_process_is_left_when_the_run_is_killed(tmp_path, escape, attempts):
    mark = f"{3000 + os.getpid()}.7"
    lines = "\n    ".join(ESCAPES[escape].splitlines())
    hang = "import re; re.fullmatch('(a+)+', 'a' * 60 + 'b')"
    (tmp_path / "program.py").write_text(
        f"MARK = {mark!r}\n{SLEEPER}\ndef main(parent):\n    {lines}\n"
        f"    time.sleep(0.1)\n    parent.send(at=os.getpid())\n    {hang}\n"
    )
    run = (
        f"import sys, time; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from multiprocessing.connection import wait\n"
        "from textpolicy.user_code.killable_process import KillableProcess\n"
        "process = KillableProcess('program:main')\n"
        "wait([process.socket])\n"
        "print(*[message['at'] for message in process.read_messages()], flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", run], stdout=subprocess.PIPE, text=True
    ) as trainer:
        worker = int(trainer.stdout.readline())
        assert running(f"sleep {mark}")
        trainer.kill()
    assert wait_until(lambda: not running(f"sleep {mark}"))
    assert wait_until(lambda: str(worker) not in all_processes())
    attempts.add()


FORGERIES = {
    "garbage": b"\xff\x00\xfe\n",
    "an empty line": b"\n",
    "a number": b"5\n",
    "a list": b"[1]\n",
    "deep nesting": b"[" * 100_000 + b"\n",
    "a huge number": b"1" * 5000 + b"\n",
    "a pickle": b"cos\nsystem\n(S'true'\ntR.\n",
    "half a line and then the end": b'{"at": ',
    "more than may be sent": b"x" * (3 << 20),
}


@pytest.mark.slow
@pytest.mark.proves("S5")
def test_bytes_that_are_no_answer_are_an_error_of_the_process_and_nothing_else(start, attempts):
    for name, forged in FORGERIES.items():
        process = start(f"import socket\nparent._socket.sendall({forged!r})")
        with pytest.raises(EOFError) as caught:
            while True:
                wait([process.socket])
                list(process.read_messages())
        assert isinstance(caught.value, ForgedAnswerError) == (not name.startswith("half")), name
        assert len(str(caught.value)) < 500
        attempts.add()


def test_a_value_is_sent_and_answered(start):
    process = start("parent.send(got=parent.receive(), session=os.getsid(0) == os.getpid())")
    process.send(["x" * 300_000, 1])
    assert messages_of(process) == [{"got": ["x" * 300_000, 1], "session": True}]


def test_the_parent_does_not_wait_for_a_process_that_reads_nothing(start, monkeypatch):
    monkeypatch.setattr("textpolicy.user_code.killable_process._SEND_SECONDS", 0.2)
    process = start("time.sleep(60)")
    started = time.monotonic()
    process.send("x" * 10_000_000)
    assert time.monotonic() - started < 5


def test_how_a_process_ended_is_described_with_what_it_printed(start):
    for body, described in {
        "print('last words', flush=True); os._exit(4)": "exited with code 4\n    last words",
        "os.kill(os.getpid(), signal.SIGTERM)": "died of SIGTERM",
        "os.kill(os.getpid(), signal.SIGKILL)": "died of SIGKILL",
    }.items():
        process = start(body)
        with pytest.raises(EOFError):
            while True:
                wait([process.socket])
                list(process.read_messages())
        assert process.kill_and_describe() == described


def test_a_message_may_arrive_in_parts(start):
    text = json.dumps({"at": 1}) + "\n"
    process = start(
        f"for part in {text!r}:\n parent._socket.sendall(part.encode()); time.sleep(0.005)\n"
        "time.sleep(60)"
    )
    assert messages_of(process) == [{"at": 1}]
