"""Model-written code changes nothing, learns nothing, outlives nothing and forges no verdict."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.security.attacks import CHEATS, ESCAPES, FLOODS, FOOL_A_SHARED_PROCESS
from textpolicy.rewards.verifiers import run_code

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "tests/security/attempts_as_user.py"
NOBODY = {"user": 65534, "group": 65534, "extra_groups": []}
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("bwrap") is None,
    reason="bubblewrap is not installed: apt install bubblewrap (Linux)",
)
numbered_calls = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the attacks name system calls by numbers of x86_64"
)


@pytest.fixture(scope="module")
def readable_package():
    """A copy of the package and the attacks that every user can read."""
    folder = Path(tempfile.mkdtemp())
    hidden = shutil.ignore_patterns("__pycache__", "tiny")
    for part in ("textpolicy", "tests/security"):
        shutil.copytree(ROOT / part, folder / part, ignore=hidden)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    yield folder
    shutil.rmtree(folder)


def python_of_nobody(folder):
    """Return a Python that a user without rights can run, or skip with the reason."""
    if os.geteuid() != 0:
        pytest.skip("only root can start a process as another user")
    tried = []
    program = (
        "import os, sys, textpolicy.rewards.verifiers; os.stat(os.path.realpath(sys.executable))"
    )
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        try:
            command = [python, "-c", program]
            subprocess.run(command, cwd=folder, **NOBODY, check=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            tried.append(f"{python}: {error}")
        else:
            return python
    pytest.skip(f"no Python that another user can run: {tried}")


@pytest.fixture(params=["this user", "an ordinary user"])
def attempt(request, readable_package):
    """Return a function that tries attacks, once as this user and once as one without rights."""
    ordinary = request.param == "an ordinary user"
    python = python_of_nobody(readable_package) if ordinary else sys.executable

    def run(*arguments):
        done = subprocess.run(
            [python, PROGRAM, *arguments],
            cwd=readable_package,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": ".", "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=400,
            **(NOBODY if ordinary else {}),
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    run.is_root = os.geteuid() == 0 and not ordinary
    return run


@numbered_calls
@pytest.mark.proves("S6")
def test_no_escape_changes_reads_or_reaches_anything(attempt, attempts):
    found = attempt("escapes")
    assert [name for name, result in found["boxed"].items() if result == "done"] == []
    assert (found["changed"], found["leaked"]) == ([], False)
    assert found["boxed"].keys() == ESCAPES.keys()
    # The same lines in a plain process do what they say, so a refusal above is the sandbox's.
    works = {"anyone", "root"} if attempt.is_root else {"anyone"}
    harmful = [name for name, (who, _) in ESCAPES.items() if who in works]
    assert [name for name in harmful if found["plain"][name] != "done"] == []
    reached = {"a port", "a socket file", "an abstract socket", "datagrams", "target", "new"}
    assert reached <= set(found["plainly changed"]) and found["plainly leaked"]
    attempts(len(found["boxed"]))


@pytest.mark.slow
def test_a_plain_process_is_judged_also_where_the_user_has_many_processes(attempt):
    assert attempt("unsafe") == [True, False]


def check_cheats(found, attempts):
    assert {name: share for name, share in found.items() if share} == {}
    attempts(len(found))


@pytest.mark.slow
@pytest.mark.proves("S6")
def test_a_cheat_passes_no_test(attempt, attempts):
    check_cheats(attempt("cheats", *list(CHEATS)[::4]), attempts)


@pytest.mark.long
@pytest.mark.proves("S6")
def test_no_cheat_of_all_passes_a_test(attempt, attempts):
    found = attempt("cheats")
    assert found.keys() == CHEATS.keys()
    check_cheats(found, attempts)


@pytest.mark.slow
def test_the_cheats_fool_a_harness_that_shares_its_process_with_the_code():
    honest = []
    for name in FOOL_A_SHARED_PROCESS:
        code, tests = CHEATS[name]
        for test in tests:
            shared = f"exec({code!r})\nexec({test!r})\nprint('the test has passed')"
            run = run_code(shared, seconds=10)
            if "the test has passed" in run.output:
                break
        else:
            honest.append((name, run.error))
    assert honest == []


def check_floods(found, attempts):
    for name, (passed, seconds, left, printed, error) in found.items():
        assert not passed and error, name
        # One second is allowed; the rest is the start of two boxes on a busy machine.
        assert seconds < 10, name
        assert left == [], name
        assert printed <= 1 << 20, name
        attempts.add()


@pytest.mark.slow
@pytest.mark.proves("S6", "S7")
def test_a_flood_is_stopped_in_time_and_nothing_of_it_is_left(attempt, attempts):
    names = ["forks without end in sessions", "takes memory in children", "hangs in C"]
    check_floods(attempt("floods", *names), attempts)


@pytest.mark.long
@pytest.mark.proves("S6", "S7")
def test_every_flood_is_stopped_in_time_and_nothing_of_it_is_left(attempt, attempts):
    found = attempt("floods")
    assert found.keys() == FLOODS.keys()
    check_floods(found, attempts)


@pytest.mark.slow
@pytest.mark.proves("S6")
@pytest.mark.parametrize("flood", ["stops everything", "leaves a daemon that spins"])
def test_no_box_outlives_a_run_that_is_killed(flood, attempts):
    program = (
        "from textpolicy.rewards.verifiers import run_code\n"
        f"run_code('import os, signal, time\\n' + {FLOODS[flood]!r}, seconds=60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT) as run:
        mark = f'"run": {run.pid},'
        # Two of bubblewrap and two of Python, and the forks in which code and test run.
        assert wait_until(lambda: len(running(mark)) >= 8)
        time.sleep(0.2)
        run.send_signal(signal.SIGKILL)
    assert wait_until(lambda: not running(mark))
    attempts.add()


def running(mark):
    shown = subprocess.run(["ps", "-wwAo", "stat=,args="], capture_output=True, text=True).stdout
    return [line for line in shown.splitlines() if mark in line and line[0] != "Z"]


def wait_until(condition, seconds=15.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found
