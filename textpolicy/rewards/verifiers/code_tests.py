"""Tests of code that a model wrote, run where it can do no harm.

Nothing here runs unless you call it. The code runs in a process of its own under bubblewrap
(Linux): no network, no files but Python's, nothing to write to, no environment, and processes that
all end with it; memory, time and output have limits. Where bubblewrap is not installed this
refuses, unless `unsafe=True` says that a plain process with the limits alone will do.

A policy that sets out to can still fool tests that share its process, with objects that equal
everything. Ending early and printing what success looks like does not help it.
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

OUTPUT_BYTES = 1 << 20
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
    """How one run ended: `passed` if it came to its end, else what was last said on stderr."""

    passed: bool
    output: str
    error: str


def code_share(
    completion: str, tests: Sequence[str], *, seconds: float = 4.0, unsafe: bool = False
) -> float:
    """Which part of `tests`, such as "assert add(1, 2) == 3", the Python code passes.

    Each test has a process and `seconds` of its own. A fence of ``` around the code is taken off.
    """
    code = python_in(completion)
    runs = [run_code(code, test, seconds=seconds, unsafe=unsafe) for test in tests]
    return sum(run.passed for run in runs) / len(runs) if runs else 0.0


def run_code(
    code: str, test: str = "", *, seconds: float = 4.0, memory: int = 1 << 29, unsafe: bool = False
) -> CodeRun:
    """Run Python code, then a test of it, with `memory` bytes and `seconds` of wall time."""
    nonce = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as errors:
        (Path(folder) / "solution.py").write_text(code, encoding="utf-8", errors="replace")
        command = _command(folder, unsafe=unsafe)
        harness = _HARNESS.format(
            memory=memory,
            cpu=int(seconds) + 1,
            output=OUTPUT_BYTES,
            folder=folder if unsafe else _BOX,
            test=test,
            nonce=nonce,
        )
        with tempfile.TemporaryFile() as output:
            _run(command, harness, output, errors, seconds)
            printed = _read(output)
        said = _read(errors)
    passed = said.endswith(nonce)
    return CodeRun(passed=passed, output=printed, error="" if passed else said[-2000:])


def python_in(completion: str) -> str:
    """The last fenced block of a completion; all of it where there is none."""
    _, opening, rest = completion.rpartition("```python\n")
    return rest.partition("```")[0] if opening else completion


def _command(folder: str, *, unsafe: bool) -> list[str]:
    python = [sys.executable, "-I", "-"]
    if unsafe:
        return python
    bubblewrap = shutil.which("bwrap")
    if bubblewrap is None:
        raise ConfigError(
            "running model-written code needs bubblewrap to lock it in, and there is no `bwrap` "
            "here; install it (Debian, Ubuntu: apt install bubblewrap), or pass unsafe=True to "
            "run it as a plain process that can read and delete what you can"
        )
    readable = ["/usr", "/lib", "/lib64", "/bin", sys.base_prefix, sys.prefix]
    # What surrounds the process is a mount of its own: nothing else of this machine is there.
    binds = [part for path in readable for part in ("--ro-bind-try", path, path)]
    return [
        *(bubblewrap, "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"),
        *binds,
        *("--proc", "/proc", "--dev", "/dev", "--ro-bind", folder, _BOX),
        *("--remount-ro", "/", "--chdir", _BOX, *python),
    ]


def _run(
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
    return file.read(OUTPUT_BYTES).decode(errors="replace")
