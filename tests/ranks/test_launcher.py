"""Ranks of one machine are started together and end together, whatever one of them does."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Timer

import pytest

from tests.ranks.test_gradients_of_ranks import NEEDS_MPI
from tests.sockets import THIS_MACHINE, addresses_of
from textpolicy.config import SFTConfig, TrainConfig
from textpolicy.config.train import RolloutOptions, RunOptions, TaskOptions
from textpolicy.environments import load
from textpolicy.errors import ConfigError
from textpolicy.experiment.following import check_can_be_divided
from textpolicy.experiment.preflight import check_before_start
from textpolicy.experiment.run_size import SizeEstimator
from textpolicy.machine import memory_bytes
from textpolicy.ranks import launcher
from textpolicy.ranks.launcher import launch

DEADLINE = 5.0
FAULTS = {
    "raise": (1, "rank 1 ended with exit code 1"),
    "killed": (137, "rank 1 ended with exit code 137"),
    "leaves": (75, "rank 0 ended with exit code 75"),
    "hangs": (75, "rank 0 ended with exit code 75"),
    "never joins": (75, "rank 1 did not join the others"),
}


def processes_of(marker: Path) -> str:
    """Return the processes with this path on their command line."""
    listed = subprocess.run(["ps", "-ewwo", "pid,args"], capture_output=True, text=True, check=True)
    return "\n".join(line for line in listed.stdout.splitlines() if str(marker) in line)


@pytest.fixture
def launched(tmp_path: Path) -> Callable[..., tuple[int, list[str]]]:
    """Return a function that runs the program with a fault, and returns its status and lines."""

    def run(fault: str, *, deadline: float = DEADLINE, **options: object) -> tuple[int, list[str]]:
        lines: list[str] = []
        program = [sys.executable, "-m", "tests.ranks.fault_program", fault, str(deadline)]
        # An argument that the program ignores, by which the test finds its processes.
        command = [*program, str(tmp_path)]
        status = launch(command, 2, deadline=deadline, tell=lines.append, **options)
        assert processes_of(tmp_path) == ""
        return status, lines

    return run


@pytest.mark.proves("F15")
@pytest.mark.parametrize(
    "fault",
    [
        *("raise", "killed", "hangs"),
        *(pytest.param(fault, marks=pytest.mark.long) for fault in ("leaves", "never joins")),
    ],
)
def test_a_fault_of_one_rank_ends_all_by_the_deadline(launched, fault: str) -> None:
    status, message = FAULTS[fault]
    started = time.monotonic()
    found, lines = launched(fault)
    # Each rank imports mlx before it waits, which takes long on a busy machine.
    assert time.monotonic() - started < DEADLINE + 2 + 20
    assert found == status, lines
    assert any(message in line for line in lines), lines


@pytest.mark.long
@pytest.mark.proves("F15")
def test_a_busy_port_ends_all_ranks_with_the_reason(launched, monkeypatch, capfd) -> None:
    with socket.socket() as busy, socket.socket() as free:
        for one in (busy, free):
            one.bind(("127.0.0.1", 0))
        busy.listen()
        ports = [one.getsockname()[1] for one in (busy, free)]
        free.close()
        monkeypatch.setattr(launcher, "_free_ports", lambda count: ports)
        status, _ = launched("none", deadline=60)
    assert status == 75
    assert "each port must be free" in " ".join(capfd.readouterr().err.split())


@NEEDS_MPI
@pytest.mark.long
@pytest.mark.proves("F15")
@pytest.mark.parametrize("fault", ["killed", "hangs"])
def test_a_fault_of_a_rank_of_open_mpi_ends_all(launched, fault: str) -> None:
    status, lines = launched(fault, backend="mpi")
    assert status == {"killed": 137, "hangs": 75}[fault], lines


def test_a_signal_to_the_launcher_reaches_the_ranks(launched) -> None:
    timer = Timer(4, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        status, lines = launched("hangs", deadline=120)
    finally:
        timer.cancel()
    assert status == 128 + signal.SIGTERM, lines


@pytest.fixture
def start_launcher(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Return a function that starts two ranks that hang by a launcher in a process of its own."""
    started: list[subprocess.Popen[bytes]] = []

    def start(backend: str) -> subprocess.Popen[bytes]:
        code = (
            "import sys; from textpolicy.ranks.launcher import launch; launch([sys.executable, "
            "'-m', 'tests.ranks.fault_program', 'hangs', '120', sys.argv[1]], 2, "
            "backend=sys.argv[2], deadline=120, tell=print)"
        )
        command = [sys.executable, "-c", code, str(tmp_path), backend]
        started.append(subprocess.Popen(command))
        until = time.monotonic() + 60
        while processes_of(tmp_path).count("fault_program") < 2 and time.monotonic() < until:
            time.sleep(0.1)
        # The ranks have joined and wait by now, or are still starting.
        time.sleep(2)
        return started[0]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.long
@pytest.mark.proves("F15")
@pytest.mark.parametrize("backend", ["ring", pytest.param("mpi", marks=NEEDS_MPI)])
def test_ranks_end_when_their_launcher_is_killed(
    start_launcher: Callable[[str], subprocess.Popen[bytes]], tmp_path: Path, backend: str
) -> None:
    start_launcher(backend).kill()
    until = time.monotonic() + 10
    while processes_of(tmp_path) and time.monotonic() < until:
        time.sleep(0.1)
    assert processes_of(tmp_path) == ""


@pytest.mark.slow
@pytest.mark.proves("S17")
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux lists the sockets")
@pytest.mark.parametrize("backend", ["ring", pytest.param("mpi", marks=NEEDS_MPI)])
def test_ranks_of_one_machine_are_not_to_be_reached_from_another(
    start_launcher: Callable[[str], subprocess.Popen[bytes]], tmp_path: Path, backend: str
) -> None:
    start_launcher(backend)
    started = processes_of(tmp_path).splitlines()
    ranks = [int(line.split()[0]) for line in started if "prterun" not in line]
    until = time.monotonic() + 60
    while len(addresses := addresses_of(ranks)) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    assert len(addresses) >= 2
    assert set(addresses) <= THIS_MACHINE


def test_a_backend_for_several_machines_is_refused_on_one() -> None:
    with pytest.raises(ConfigError, match=r"mlx\.launch"):
        launch(["true"], 2, backend="jaccl", tell=print)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SFTConfig(), "supervised training runs in one process, and 2 ranks"),
        (TrainConfig(rollout=RolloutOptions(max_staleness=3)), "must all train on the same groups"),
        (TrainConfig(rollout=RolloutOptions(workers=1)), "each of which samples its part itself"),
    ],
)
def test_what_ranks_cannot_divide_is_refused(settings: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_can_be_divided(settings, 2)
    check_can_be_divided(settings, 1)


def test_ranks_that_need_more_memory_than_the_machine_has_are_refused() -> None:
    config = TrainConfig(task=TaskOptions(env="add"), run=RunOptions(steps=1))
    environment = load("add")
    size = SizeEstimator(config, environment).estimate(config)
    many = memory_bytes() // size.memory_bytes + 1
    folder = Path()
    with pytest.raises(ConfigError, match=f"each of {many} ranks on this machine needs about"):
        check_before_start(config, environment, folder, print, processes=many)
    check_before_start(config, environment, folder, print, processes=2)
