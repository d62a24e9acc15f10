"""A process for the user's code that is ended together with everything that it has started.

`KillableProcess` is the parent's end. It starts a Python process, sends it messages, reads its
answers, and kills it. The process splits into two at once:

- The guard runs none of the user's code. It waits until the parent asks for the end, until the
  parent itself is gone, or until the worker has ended. Then it kills every process below it.
- The worker imports the user's code and calls it.

On Linux the guard is the reaper of all processes below it, so a process that starts a session of
its own, or whose parent has ended, stays below the guard and is killed with the rest. On macOS a
process whose parent has ended belongs to the system, and the guard finds it only in the worker's
own process group.

The parent reads nothing but JSON, because the user's code could have written what it reads.
"""

import ctypes
import faulthandler
import json
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, NoReturn, cast

_MAX_MESSAGE_BYTES = 1 << 20
_KEPT_OUTPUT_BYTES = 4096
_MAX_OUTPUT_LINES, _MAX_LINE_WIDTH = 12, 200
_SEND_SECONDS = 10.0
"""How long the parent waits for a process that does not read what it is sent."""
_GUARD_SECONDS = 2.0
"""How long the guard may take to end all processes, before the parent does it."""
_RETRY_SECONDS = 0.002
_MAX_EXCERPT = 80
_LENGTH = struct.Struct("!Q")
_SET_DEATH_SIGNAL, _SET_REAPER = 1, 36
"""Numbers of the calls of prctl: PR_SET_PDEATHSIG and PR_SET_CHILD_SUBREAPER."""


class ForgedAnswerError(EOFError):
    """The process wrote something that is not an answer. The message says what."""


class KillableProcess:
    """The parent's end of a process that runs `entry`, such as "package.module:function".

    The function receives a `ParentLink`. `socket` and `output` can be waited for: they are readable
    when `read_messages` and `read_output` have something to read. With `uses_mlx`, the worker is a
    fresh program and no fork, and what it prints goes where this process prints.
    """

    def __init__(
        self,
        entry: str,
        *,
        max_message_bytes: int = _MAX_MESSAGE_BYTES,
        uses_mlx: bool = False,
    ) -> None:
        self._max_message_bytes = max_message_bytes
        self.socket, worker_socket = socket.socketpair()
        # Nothing is written to this pipe. The guard reads its end when the parent has ended.
        lifeline, held_lifeline = os.pipe()
        self.output, worker_output = os.pipe()
        os.set_blocking(self.output, False)
        self.socket.setblocking(False)
        program = (
            f"{_same_path()}"
            "from textpolicy.user_code.killable_process import run_guarded\n"
            f"run_guarded({entry!r}, {worker_socket.fileno()}, {lifeline}, {uses_mlx})"
        )
        with worker_socket:
            self.process = subprocess.Popen(
                # Unbuffered: the last words of code that crashes are then read too.
                [sys.executable, "-u", "-c", program],
                pass_fds=[worker_socket.fileno(), lifeline],
                stdin=subprocess.DEVNULL,
                stdout=None if uses_mlx else worker_output,
                stderr=None if uses_mlx else worker_output,
                start_new_session=True,
            )
        os.close(worker_output)
        os.close(lifeline)
        # Called at the latest when this object is collected; further calls have no effect.
        self.kill = weakref.finalize(
            self, _end_process, self.process, held_lifeline, self.socket, self.output
        )
        self.output_is_open = not uses_mlx
        self._last_output = b""
        self._received = bytearray()

    def send(self, content: object) -> None:
        """Send a value, pickled. If the process has died, reading its messages finds that out."""
        data = ForkingPickler.dumps(content)
        self.socket.settimeout(_SEND_SECONDS)
        with suppress(OSError):
            self.socket.sendall(_LENGTH.pack(len(data)) + data)
        self.socket.setblocking(False)

    def read_messages(self) -> Iterator[Mapping[str, Any]]:
        """Yield what has arrived, without waiting.

        Raise EOFError if the process has ended, and `ForgedAnswerError` if it wrote something that
        cannot be an answer. The process has to be killed after either.
        """
        self.read_output()
        ended = not self._receive()
        *lines, self._received = self._received.split(b"\n")
        for line in lines:
            yield _as_message(bytes(line))
        if len(self._received) > self._max_message_bytes:
            raise ForgedAnswerError(f"an answer of more than {self._max_message_bytes} bytes")
        if ended:
            raise EOFError

    def has_ended(self) -> bool:
        """Return whether the process has ended."""
        return self.process.poll() is not None or not self._receive()

    def read_output(self) -> None:
        """Read what the user's code has printed, so that printing never blocks; keep the end."""
        with suppress(BlockingIOError):
            while self.output_is_open:
                data = os.read(self.output, 1 << 16)
                self.output_is_open = bool(data)
                self._last_output = (self._last_output + data)[-_KEPT_OUTPUT_BYTES:]

    def kill_and_describe(self) -> str:
        """End the process and return how it ended, with the last lines that it printed."""
        self.read_output()
        self.kill()
        code = self.process.returncode
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        printed = self._last_output.decode(errors="replace").strip().splitlines()
        lines = [line[:_MAX_LINE_WIDTH] for line in printed[-_MAX_OUTPUT_LINES:]]
        return "\n    ".join([how, *lines])

    def _receive(self) -> bool:
        """Read what is there without waiting; return False if no more can come."""
        try:
            while len(self._received) <= self._max_message_bytes:
                data = self.socket.recv(1 << 16)
                if not data:
                    return False
                self._received += data
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return False
        return True


class ParentLink:
    """The worker's end: it receives what the parent sends, and sends messages of JSON."""

    def __init__(self, descriptor: int) -> None:
        # Programs that the user's code starts should not hold the socket.
        os.set_inheritable(descriptor, False)
        self._socket = socket.socket(fileno=descriptor)

    def receive(self) -> Any:
        """Return the next value; raise EOFError if the parent has closed its end."""
        return self.unpickle(self.receive_bytes())

    def receive_bytes(self) -> bytes:
        """Return the next value for `unpickle`, which may raise any error."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        return self._read(length)

    def unpickle(self, data: bytes) -> Any:
        """Return a value that the parent has sent."""
        # The type stub takes this function for a method.
        return ForkingPickler.loads(data)  # pyright: ignore[reportAttributeAccessIssue]

    def send(self, **message: Any) -> None:
        """Send one message to the parent."""
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _read(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            part = self._socket.recv(min(length - len(data), 1 << 20))
            if not part:
                raise EOFError
            data += part
        return bytes(data)


def run_guarded(entry: str, descriptor: int, lifeline: int, uses_mlx: bool = False) -> None:
    """Split into the guard and the worker; the worker runs `entry`.

    With `uses_mlx`, the worker is a fresh program: GPUs do not work after a fork.
    """
    os.set_inheritable(lifeline, False)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    _prctl(_SET_REAPER, 1)
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    worker = _start_program(entry, descriptor) if uses_mlx else os.fork()
    if worker:
        os.close(descriptor)
        _guard(worker, lifeline, woken)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for unused in (lifeline, woken, wakes):
        os.close(unused)
    os.setsid()
    run_entry(entry, descriptor)


def run_entry(entry: str, descriptor: int) -> None:
    """Call the function "package.module:function" with the link to the parent."""
    _prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    faulthandler.enable()
    module, _, function = entry.partition(":")
    vars(import_module(module))[function](ParentLink(descriptor))


def _start_program(entry: str, descriptor: int) -> int:
    """Start a program that runs `entry` in a session of its own, and return its process id."""
    program = (
        f"{_same_path()}"
        "from textpolicy.user_code.killable_process import run_entry\n"
        f"run_entry({entry!r}, {descriptor})"
    )
    return subprocess.Popen(
        [sys.executable, "-u", "-c", program], pass_fds=[descriptor], start_new_session=True
    ).pid


def kill_descendants(process_id: int) -> None:
    """Kill every process below this one, until there is none."""
    while living := [pid for pid, is_alive in _processes_below(process_id) if is_alive]:
        for pid in living:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_RETRY_SECONDS)


def _guard(worker: int, lifeline: int, woken: int) -> NoReturn:
    """Wait for the end of the worker or of the parent; kill all, and end as the worker ended."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    ended: dict[int, int] = {}
    while worker not in ended and lifeline not in select.select([lifeline, woken], [], [])[0]:
        os.read(woken, 1 << 10)
        _reap(ended)
    with suppress(ProcessLookupError):
        os.killpg(worker, signal.SIGKILL)
    while not _reap(ended):
        for pid, _ in _processes_below(os.getpid()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_RETRY_SECONDS)
    code = os.waitstatus_to_exitcode(ended[worker])
    if code < 0:
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _reap(ended: dict[int, int]) -> bool:
    """Note which children have ended; return whether no child is left."""
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return False
            ended[pid] = status
    return True


def _processes_below(process_id: int) -> list[tuple[int, bool]]:
    """Return the ids of all processes below this one, and whether each is more than a zombie."""
    children: dict[int, list[tuple[int, bool]]] = {}
    for pid, parent, state in _list_processes():
        children.setdefault(parent, []).append((pid, state[0] not in "ZX"))
    found = list(children.get(process_id, []))
    for pid, _ in found:
        found += children.get(pid, [])
    return found


def _list_processes() -> Iterator[tuple[int, int, str]]:
    """Yield the id, the parent's id and the state of every process."""
    if sys.platform != "linux":
        shown = subprocess.run(["ps", "-Ao", "pid=,ppid=,stat="], capture_output=True, text=True)
        for line in shown.stdout.splitlines():
            pid, parent, state = line.split()[:3]
            yield int(pid), int(parent), state
        return
    for name in os.listdir("/proc"):
        if name.isdecimal():
            # The process may have ended since it was listed.
            with suppress(OSError):
                status = Path("/proc", name, "stat").read_text("utf-8", "replace")
                # The name of the program stands in parentheses, and may hold spaces.
                state, parent = status.rpartition(")")[2].split()[:2]
                yield int(name), int(parent), state


def _same_path() -> str:
    """Return the line of a program that lets it import what this process can import."""
    return f"import sys; sys.path[:] = {sys.path!r}\n"


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _as_message(line: bytes) -> Mapping[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise ForgedAnswerError(f"{line[:_MAX_EXCERPT]!r}")
    return cast("dict[str, Any]", message)


def _end_process(
    process: subprocess.Popen[bytes], lifeline: int, own_socket: socket.socket, output: int
) -> None:
    """Let the guard end all processes; if the guard cannot, end them from here."""
    os.close(lifeline)
    with suppress(ProcessLookupError):
        # The user's code may have stopped the guard.
        process.send_signal(signal.SIGCONT)
    try:
        process.wait(_GUARD_SECONDS)
    except subprocess.TimeoutExpired:
        kill_descendants(process.pid)
        process.kill()
        process.wait()
    own_socket.close()
    os.close(output)
