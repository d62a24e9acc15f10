"""Run tests of code that a model wrote, isolated from this machine.

Nothing runs unless a reward calls `code_share` or `run_code`. The code runs in a process of its own
under bubblewrap (Linux): no network, no files except Python's, no writable folder, no environment.
All its processes end with it, and memory, time and output are limited. Without bubblewrap the call
is refused, unless `unsafe=True` allows a plain process with the limits alone.

A policy can still deceive tests that share its process, with objects that equal everything. Ending
early, or printing what a success prints, deceives no test.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from textpolicy.errors import ConfigError

_MAX_OUTPUT_BYTES = 1 << 20
_BOX = "/box"
_HARNESS = """\
import resource, sys
def limit(what, most):
    _, hard = resource.getrlimit(what)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(what, (most, most))
limit(resource.RLIMIT_AS, {memory})
limit(resource.RLIMIT_CPU, {cpu})
limit(resource.RLIMIT_FSIZE, {output})
limit(resource.RLIMIT_NOFILE, 64)
limit(resource.RLIMIT_NPROC, 64)
limit(resource.RLIMIT_CORE, 0)
del limit, resource
sys.path.insert(0, {folder!r})
sys.dont_write_bytecode = True
from solution import *
{test}
sys.__stdout__.flush()
sys.__stderr__.write({nonce!r})
sys.__stderr__.flush()
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeRun:
    """How one run ended: `passed` if it ran to its end; otherwise `error` is the end of stderr."""

    passed: bool
    output: str
    error: str


def code_share(
    completion: str, tests: Sequence[str], *, seconds: float = 4.0, unsafe: bool = False
) -> float:
    """Return the share of `tests`, such as "assert add(1, 2) == 3", that the Python code passes.

    Each test runs in a process of its own for up to `seconds`. A fence of ``` around the code is
    removed.
    """
    code = python_in(completion)
    runs = [run_code(code, test, seconds=seconds, unsafe=unsafe) for test in tests]
    return sum(run.passed for run in runs) / len(runs) if runs else 0.0


def run_code(
    code: str, test: str = "", *, seconds: float = 4.0, memory: int = 1 << 29, unsafe: bool = False
) -> CodeRun:
    """Run Python code and then a test, with up to `memory` bytes and `seconds` of wall time."""
    nonce = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as errors:
        (Path(folder) / "solution.py").write_text(code, encoding="utf-8", errors="replace")
        command = _command(folder, unsafe=unsafe)
        harness = _HARNESS.format(
            memory=memory,
            cpu=int(seconds) + 1,
            output=_MAX_OUTPUT_BYTES,
            folder=folder if unsafe else _BOX,
            test=test,
            nonce=nonce,
        )
        with tempfile.TemporaryFile() as output:
            _run_process(command, harness, output, errors, seconds)
            printed = _read(output)
        stderr = _read(errors)
    passed = stderr.endswith(nonce)
    return CodeRun(passed=passed, output=printed, error="" if passed else stderr[-2000:])


def python_in(completion: str) -> str:
    """Return the last fenced block of a completion, or the whole completion if there is none."""
    _, opening, rest = completion.rpartition("```python\n")
    return rest.partition("```")[0] if opening else completion


def _command(folder: str, *, unsafe: bool) -> list[str]:
    python = [sys.executable, "-I", "-"]
    if unsafe:
        return python
    bubblewrap = shutil.which("bwrap")
    if bubblewrap is None:
        raise ConfigError(
            "running model-written code needs bubblewrap to isolate the code, and the command "
            "`bwrap` is not installed; install it (Debian, Ubuntu: apt install bubblewrap), or "
            "pass unsafe=True to run the code as a plain process that can delete your files"
        )
    readable = ["/usr", "/lib", "/lib64", "/bin", sys.base_prefix, sys.prefix]
    # The process sees only these folders, read-only, and nothing else of this machine.
    binds = [part for path in readable for part in ("--ro-bind-try", path, path)]
    return [
        *(bubblewrap, "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"),
        *binds,
        *("--proc", "/proc", "--dev", "/dev", "--ro-bind", folder, _BOX),
        *("--remount-ro", "/", "--chdir", _BOX, *python),
    ]


def _run_process(
    command: Sequence[str], program: str, output: IO[bytes], errors: IO[bytes], seconds: float
) -> None:
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=errors,
        env={"PATH": "/usr/bin:/bin"},
        start_new_session=True,
    )
    try:
        process.communicate(program.encode(errors="replace"), timeout=seconds)
    except subprocess.TimeoutExpired:
        errors.write(f"took longer than {seconds} s".encode())
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(_MAX_OUTPUT_BYTES).decode(errors="replace")
