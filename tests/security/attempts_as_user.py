"""Tries the attacks as the user that runs this file, and prints what came of them as JSON.

    PYTHONPATH=. python tests/security/attempts_as_user.py escapes

It needs Python and the package alone, because the Python of the tests may not be the user's to run.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from attacks import CHEATS, ESCAPES, FLOODS, PRELUDE

from textpolicy.rewards.verifiers import code_share, run_code
from textpolicy.rewards.verifiers.sandbox.code_judge import CodeJudge

SECRET = "SECRET-4711"
ESCAPE_SECONDS = 3
DRIVER = """
import json, select
ATTACKS, NAMES = json.loads({text!r})
def try_one(lines):
    own, other = os.pipe()
    child = os.fork()
    if not child:
        os.close(own)
        signal.alarm({seconds})
        try:
            exec(lines, dict(globals(), **NAMES))
            result = "done"
        except BaseException as error:
            result = f"{{type(error).__name__}}: {{error}}"
        sys.stdout.flush()
        os.write(other, result.encode()[:500])
        os._exit(0)
    os.close(other)
    result = os.read(own, 1000).decode(errors="replace")
    os.close(own)
    os.waitpid(child, 0)
    return result
print("RESULTS " + json.dumps({{name: try_one(lines) for name, lines in ATTACKS.items()}}))
"""


class Canaries:
    """What an escape would change, read or reach."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        for name in ("secret", ".env"):
            (folder / name).write_text(SECRET)
        for name in ("target", "to-delete", "to-rename", "to-chmod", "to-cut"):
            (folder / name).write_text("as it was")
        os.environ["CANARY"] = SECRET
        self.left_open = os.open(folder / "secret", os.O_RDONLY)
        os.set_inheritable(self.left_open, True)
        self.reached: list[str] = []
        listeners = {
            "a port": socket.create_server(("127.0.0.1", 0)),
            "a socket file": self._listener(str(folder / "socket")),
            "an abstract socket": self._listener(f"\0canary-{os.getpid()}"),
        }
        datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        datagrams.bind(str(folder / "datagrams"))
        self.sockets = {**listeners, "datagrams": stack.enter_context(datagrams)}
        for listener in listeners.values():
            stack.enter_context(listener)
        libc = __import__("ctypes").CDLL(None)
        self.shared = libc.shmget(0, 4096, 0o600)
        stack.callback(libc.shmctl, self.shared, 0, None)
        self.names = {
            "secret": str(folder / "secret"),
            "target": str(folder / "target"),
            "folder": str(folder),
            "pid": os.getpid(),
            "node": os.uname().nodename,
            "port": self.sockets["a port"].getsockname()[1],
            "path": str(folder / "socket"),
            "abstract": f"\0canary-{os.getpid()}",
            "datagrams": str(folder / "datagrams"),
            "shared": self.shared,
        }
        self.before = self.state()

    def _listener(self, address: str) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address)
        listener.listen(8)
        return listener

    def state(self) -> dict[str, Any]:
        """Return all that an escape could change in the folder."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            status = path.lstat()
            found[path.name] = [status.st_mode, status.st_nlink, status.st_mtime, status.st_size]
        return found

    def changes(self) -> list[str]:
        """Return what was changed, and who was reached, since the last call."""
        now = self.state()
        changed = [
            name for name in now.keys() | self.before if now.get(name) != self.before.get(name)
        ]
        for name, listener in self.sockets.items():
            listener.settimeout(0)
            with suppress(BlockingIOError):
                listener.recv(10) if name == "datagrams" else listener.accept()[0].close()
                changed.append(name)
        self.before = now
        return changed


@contextmanager
def canaries() -> Iterator[Canaries]:
    with ExitStack() as stack:
        folder = tempfile.mkdtemp()
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield Canaries(Path(folder), stack)


def escapes() -> dict[str, Any]:
    """Try all escapes in a box, then those that harm nothing in a plain process."""
    with canaries() as canary:
        boxed, printed = _run_boxed({name: lines for name, (_, lines) in ESCAPES.items()}, canary)
        changed = canary.changes()
        harmless = {name: lines for name, (who, lines) in ESCAPES.items() if who != "nobody"}
        plain, plainly_printed = _run_plainly(harmless, canary)
        return {
            "boxed": boxed,
            "changed": changed,
            "leaked": SECRET in printed,
            "plain": plain,
            "plainly changed": canary.changes(),
            "plainly leaked": SECRET in plainly_printed,
        }


def _driver(attacks: dict[str, str], canary: Canaries) -> str:
    text = json.dumps([attacks, canary.names])
    return PRELUDE + DRIVER.format(text=text, seconds=ESCAPE_SECONDS)


def _run_boxed(attacks: dict[str, str], canary: Canaries) -> tuple[dict[str, str], str]:
    run = run_code(_driver(attacks, canary), seconds=60)
    return _results(run.output, run.error), run.output


def _run_plainly(attacks: dict[str, str], canary: Canaries) -> tuple[dict[str, str], str]:
    run = subprocess.run(
        [sys.executable, "-c", _driver(attacks, canary)],
        capture_output=True,
        pass_fds=[canary.left_open],
        timeout=120,
    )
    output = run.stdout.decode(errors="replace")
    return _results(output, run.stderr.decode(errors="replace")), output


def _results(output: str, error: str) -> dict[str, str]:
    _, found, results = output.partition("RESULTS ")
    if not found:
        raise SystemExit(f"the attacks did not run to their end: {error}")
    return json.loads(results)


def floods(names: list[str]) -> dict[str, Any]:
    """Return for each flood whether it passed, how long it took, and what it left behind."""
    found = {}
    with closing(CodeJudge("")) as judge:
        judge.run("", 10)
        assert len(_boxed_processes()) >= 6, "the list of processes shows no boxes"
    for name in names:
        code, _, test = FLOODS[name].partition("#test: ")
        started = time.monotonic()
        run = run_code(f"import os, signal, sys, threading, time\n{code}", test, seconds=1.0)
        seconds = time.monotonic() - started
        left = [line for line in _boxed_processes() if line]
        found[name] = [run.passed, seconds, left, len(run.output), run.error[-200:]]
    return found


def _boxed_processes() -> list[str]:
    """Return the processes of boxes of this run, zombies left out."""
    shown = subprocess.run(["ps", "-wwAo", "stat=,args="], capture_output=True, text=True)
    mark = f'"run": {os.getpid()},'
    return [line[:80] for line in shown.stdout.splitlines() if mark in line and line[0] != "Z"]


def cheats(names: list[str]) -> dict[str, float]:
    """Return the share of tests that each cheat passes."""
    return {name: code_share(*CHEATS[name], seconds=5.0) for name in names}


def unsafe() -> list[bool]:
    """Return whether a right and a wrong program pass, while this user has many processes."""
    with ExitStack() as stack:
        for _ in range(80):
            process = stack.enter_context(subprocess.Popen(["sleep", "60"]))
            stack.callback(process.kill)
        tests = ["assert add(1, 2) == 3", "assert add(1, 2) == 4"]
        code = "def add(a, b): return a + b"
        return [run_code(code, test, unsafe=True).passed for test in tests]


if __name__ == "__main__":
    what, *chosen = sys.argv[1:]
    done: Any = None
    match what:
        case "escapes":
            done = escapes()
        case "floods":
            done = floods(chosen or list(FLOODS))
        case "cheats":
            done = cheats(chosen or list(CHEATS))
        case "unsafe":
            done = unsafe()
    sys.stdout.write(json.dumps(done))
