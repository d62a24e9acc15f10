"""Model-written code is tested, and is isolated whatever it tries."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.rewards.honest_code import HONEST
from textpolicy.errors import ConfigError
from textpolicy.rewards.verifiers import code_share, python_in, run_code
from textpolicy.rewards.verifiers.sandbox import box

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


@boxed
@pytest.mark.slow
def test_honest_code_passes_its_tests_whatever_crosses_between_them():
    failed = {}
    for name, (code, test) in HONEST.items():
        if "numpy" in name and not find_spec("numpy"):
            continue
        run = run_code(code, test, seconds=20)
        if not run.passed:
            failed[name] = run.error
    assert failed == {}


@pytest.mark.slow
@boxed
def test_each_test_runs_the_code_afresh_and_a_late_one_costs_the_others_nothing():
    code = "import time\nn = 0\ndef tick(wait):\n    global n\n    n += 1\n"
    code += "    time.sleep(wait)\n    return n"
    tests = ["assert tick(0) == 1", "assert tick(60) == 1", "assert tick(0) == 1", "tick(0) + ''"]
    assert code_share(code, tests, seconds=1.5) == 0.5


@boxed
def test_what_is_printed_by_the_code_and_by_the_test_is_returned():
    run = run_code("def f(): print('b')", "print('a'); f(); print('c')")
    # The two print from two boxes, so only the order of each one's lines is kept.
    assert run.output in ("a\nb\nc\n", "b\na\nc\n", "a\nc\nb\n")


REASONS = {
    "assert f() + 1 == 2": "calculates with a plain value and an object of X",
    "assert f() < 1": "compares a plain value with an object of X",
    "g(object())": "a test can pass plain values, functions and objects of the code",
    "h()": "the code ended its process",
    "import os; os._exit(0)": "the test ended its process",
    "f(": "SyntaxError",
    "e()": "ZeroDivisionError: division by zero",
}


@boxed
@pytest.mark.parametrize("test", REASONS)
def test_a_failure_says_its_reason(test):
    code = "import os\nclass X: pass\ndef f(): return X()\ndef g(x): return x\n"
    code += "def h(): os._exit(0)\ndef e(): return 1 / 0\n"
    run = run_code(code, test)
    assert not run.passed and REASONS[test] in run.error


def test_a_plain_process_has_limits_of_memory_output_and_time():
    for code in ("x = bytearray(3 << 30)", "while True: print('x' * 100_000)", "while True: pass"):
        run = run_code(code, seconds=0.7, unsafe=True)
        assert not run.passed and run.error and len(run.output) <= 1 << 20


@boxed
def test_a_box_that_does_not_start_is_refused_with_the_reason(tmp_path, monkeypatch):
    bubblewrap = tmp_path / "bwrap"
    bubblewrap.write_text(
        "#!/bin/sh\necho 'bwrap: No permissions to create a namespace' >&2\nexit 1"
    )
    bubblewrap.chmod(0o755)
    box.check_boxes.cache_clear()
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ConfigError, match=r"refused.*No permissions to create.*unsafe=True"):
        run_code(ADD)


# What a bubblewrap leaves out or adds, as an older or a patched one may, and what the check says.
HOLES = {
    "--unshare-pid": ("", "sees processes of the machine"),
    "--clearenv": ("", "sees the environment"),
    "--seccomp": ("", "has no filter of system calls"),
    "a /proc": ("--proc /proc", "sees files of the machine"),
    "a folder to write": ("--bind {folder} /usr/lib/python3", "can write a file"),
}


@boxed
@pytest.mark.slow
@pytest.mark.proves("S6")
@pytest.mark.parametrize("hole", HOLES)
def test_the_check_before_the_first_use_finds_a_hole(tmp_path, monkeypatch, hole, attempts):
    added, found = HOLES[hole]
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    added = added.format(folder=tmp_path / "open")
    (tmp_path / "bwrap").write_text(
        f"#!{sys.executable}\nimport os, sys\nargs = sys.argv[1:]\n"
        f"if {hole!r} in args:\n    at = args.index({hole!r})\n"
        f"    del args[at : at + 1 + ({hole!r} == '--seccomp')]\n"
        f"at = args.index('--remount-ro')\nargs[at:at] = {added.split()!r}\n"
        f"os.execv({shutil.which('bwrap')!r}, ['bwrap', *args])\n"
    )
    (tmp_path / "bwrap").chmod(0o755)
    box.check_boxes.cache_clear()
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(box, "_ENVIRONMENT", {"PATH": "/usr/bin:/bin", "CANARY": "x"})
    with pytest.raises(ConfigError, match=f"does not isolate.*{found}"):
        run_code(ADD)
    attempts.add()


def test_without_bubblewrap_the_call_is_refused(monkeypatch):
    box.check_boxes.cache_clear()
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
