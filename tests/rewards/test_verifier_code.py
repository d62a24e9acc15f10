"""Model-written code is tested, and is isolated whatever it tries."""

import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import closing

import pytest

from tests.timing import least_seconds
from textpolicy.errors import ConfigError
from textpolicy.rewards.verifiers import code_share, python_in, run_code

boxed = pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="bubblewrap is not installed: apt install bubblewrap"
)
SAFETY = [pytest.param(False, marks=boxed, id="boxed"), pytest.param(True, id="unsafe")]
ADD = "def add(a, b):\n    return a + b\n"


@pytest.mark.slow
@pytest.mark.parametrize("unsafe", SAFETY)
def test_the_share_of_passing_tests_counts(unsafe):
    tests = ["assert add(1, 2) == 3", "assert add(1, 2) == 4", "assert undefined", "add('a', 'b')"]
    answer = f"Here it is:\n```python\n{ADD}```\nDone."
    assert code_share(answer, tests, unsafe=unsafe) == 0.5
    assert code_share("def add(:", tests, unsafe=unsafe) == 0.0
    assert code_share(answer, [], unsafe=unsafe) == 0.0


def test_code_is_taken_from_the_last_fence():
    assert python_in("```python\na\n```\n```python\nb\n```\n") == "b\n"
    assert python_in("x = 1") == "x = 1"


@pytest.mark.parametrize("unsafe", SAFETY)
def test_a_failing_run_returns_the_error_of_python(unsafe):
    run = run_code(ADD, "print(add(1, 2)); assert add(1, 2) == 4", unsafe=unsafe)
    assert (run.passed, run.output) == (False, "3\n")
    assert "AssertionError" in run.error
    assert run_code(ADD, "print(add(1, 2))", unsafe=unsafe).output == "3\n"


FORGERIES = {
    "ends early": "import sys; sys.exit(0)",
    "ends at once": "import os; os._exit(0)",
    "prints success": "print('passed'); raise SystemExit",
    "raises": "raise ValueError",
    "interrupts": "raise KeyboardInterrupt",
    "closes stderr": "import os; os.close(2)",
    "kills itself": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize("code", FORGERIES.values(), ids=FORGERIES)
def test_code_that_ends_before_the_test_does_not_pass(code):
    assert not run_code(code, "assert add(1, 2) == 3", unsafe=True).passed


LIMITS = {
    "loops": "while True: pass",
    "sleeps": "import time; time.sleep(60)",
    "takes memory": "x = bytearray(3 << 30)",
    "floods its output": "while True: print('x' * 100_000)",
    "floods stderr": "import sys\nwhile True: sys.stderr.write('x' * 100_000)",
    "writes a large file": "open('/dev/shm/big', 'wb').write(bytes(1 << 24))",
    "opens many files": "x = [open('/dev/null') for _ in range(100)]",
}


@pytest.mark.slow
@pytest.mark.parametrize("unsafe", SAFETY)
@pytest.mark.parametrize("code", LIMITS.values(), ids=LIMITS)
def test_code_that_exceeds_a_limit_is_stopped(code, unsafe):
    def run():
        stopped = run_code(code, seconds=0.7, unsafe=unsafe)
        assert not stopped.passed
        assert len(stopped.output) <= 1 << 20

    assert least_seconds(run, below=1.5) < 1.5


@boxed
def test_processes_that_the_code_leaves_behind_end_with_it():
    mark = f"left-behind-{os.getpid()}"
    code = (
        "import subprocess, sys\n"
        f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', {mark!r}],\n"
        "                 start_new_session=True)\n"
    )
    assert run_code(code).passed
    deadline = time.monotonic() + 5
    while (running := _is_running(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running


def _is_running(mark: str) -> bool:
    return mark in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


@boxed
def test_the_code_sees_only_the_files_of_python_no_network_and_no_environment(
    tmp_path, monkeypatch
):
    secret = tmp_path / "secret"
    secret.write_text("canary")
    monkeypatch.setenv("CANARY_TOKEN", "canary")
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        listener.settimeout(0.1)
        port = listener.getsockname()[1]
        attempts = {
            "read a file": f"open({str(secret)!r})",
            "read the passwords": "open('/etc/shadow')",
            "list the home": f"os.listdir({os.path.expanduser('~')!r}).index('x')",
            "write where it stands": "open('x', 'w')",
            "write to the root": "open('/x', 'w')",
            "change python": f"open({os.__file__!r}, 'a')",
            "connect": f"socket.create_connection(('127.0.0.1', {port}), 1)",
            "find a name": "socket.getaddrinfo('localhost.example', 80)",
            "signal the parent": f"os.kill({os.getpid()}, 0)",
            "read the environment": "os.environ['CANARY_TOKEN']",
            "read the parent's": f"open('/proc/{os.getpid()}/environ')",
        }
        for attempt, expression in attempts.items():
            run = run_code(f"import os, socket\n{expression}")
            assert not run.passed and "rror" in run.error, attempt
            assert "canary" not in run.output
        with pytest.raises(TimeoutError):
            listener.accept()
    assert secret.read_text() == "canary"


def test_without_bubblewrap_the_call_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"needs bubblewrap.*unsafe=True"):
        run_code(ADD)


def test_verifiers_run_no_code_unless_asked():
    program = (
        "import sys\n"
        "from textpolicy.rewards import verifiers\n"
        "sys.addaudithook(lambda event, _: event == 'subprocess.Popen' and sys.exit(1))\n"
        "verifiers.math_equal('__import__(\"os\")', '5')\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
