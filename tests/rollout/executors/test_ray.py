"""Rollout workers that are Ray actors, with Ray on this machine."""

import os
import signal
import sys
import time
from contextlib import closing, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.experiment.test_workers import in_process as run_in_process
from tests.experiment.test_workers import processes_below, train, wait_for_rows
from tests.faults.killable_runs import start_command
from tests.rollout.executors import builders
from tests.rollout.executors.test_crew import (
    in_process,
    job_of,
    one_by_one,
    play,
    policy,
    published,
    rollouts_of,
    tasks_that,
)
from tests.sockets import LISTENING, THIS_MACHINE, addresses_of
from textpolicy.cli import main
from textpolicy.errors import ConfigError, RewardError
from textpolicy.rollout.executors.crew import Crew
from textpolicy.rollout.executors.local_ray import LocalRay, import_ray
from textpolicy.rollout.executors.ray import RayWorkers
from textpolicy.runs import RunDirectory

__all__ = ["policy", "published", "run_in_process"]

RUN = ["train", "--env", "add", "--groups-per-step", "2", "--group-size", "4", "--count", "4"]
HAS_RAY = find_spec("ray") is not None
needs_ray = pytest.mark.skipif(
    not HAS_RAY, reason="Ray is not installed: pip install 'textpolicy[ray]'"
)
pytestmark = [
    pytest.mark.slow,
    # Ray's own modules warn when they are imported.
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(scope="module")
def home():
    """Return Ray on this machine, started once: that takes many seconds."""
    home = LocalRay(2)
    processes = processes_below(home._process.process.pid)
    yield home
    home.close()
    assert len(processes) >= 5
    assert not any(Path(f"/proc/{one}").exists() for one in processes)
    assert not Path(home._folder).exists()


@pytest.fixture(scope="module")
def notes():
    return []


@pytest.fixture(scope="module")
def crew(home, tmp_path_factory, published, notes):
    """Return one worker for the tests of faults."""
    workers = RayWorkers(builders.add_worker, 1, home.address)
    with closing(Crew(workers, 1, tmp_path_factory.mktemp("crew"), note=notes.append)) as crew:
        crew.follow(3, published)
        yield crew


def actors():
    """Return the ids of the processes of actors that hold workers."""
    found = []
    for process in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            if Path("/proc", process, "cmdline").read_bytes().startswith(b"ray::WorkerHost"):
                found.append(int(process))
    return found


def take_environment(variables):
    """Take those of this process, among which is the token for its Ray."""
    os.environ.update(variables)


def wait_until_gone(processes, seconds, log):
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{one}").exists() for one in processes):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_a_run_says_what_to_install_for_ray(tmp_path, capsys):
    assert main([*RUN, "--workers", "1", "--ray", "local", "--output", str(tmp_path / "run")]) == 2
    assert "pip install 'textpolicy[ray]'" in capsys.readouterr().err


@needs_ray
def test_one_actor_gives_the_run_of_one_process_to_the_bit(home, run_in_process, tmp_path):
    transport = RayWorkers(builders.add_worker, 1, home.address)
    rollouts, adapter = train(tmp_path, 1, transport=transport)
    assert rollouts == run_in_process[0]
    assert adapter == run_in_process[1]
    versions = {rows[0]["version"] for step in rollouts for rows in step.values()}
    assert len(versions) >= 20


@needs_ray
def test_a_run_on_a_cluster_is_that_of_one_process(home, tmp_path):
    options = [*RUN, "--steps", "2", "--output"]
    on_ray = ["--workers", "1", "--ray", home.address]
    handler = signal.getsignal(signal.SIGTERM)
    assert main([*options, str(tmp_path / "ray"), *on_ray]) == 0
    assert signal.getsignal(signal.SIGTERM) is handler
    assert main([*options, str(tmp_path / "here")]) == 0
    on_ray, here = RunDirectory(tmp_path / "ray"), RunDirectory(tmp_path / "here")
    assert on_ray.latest.read_bytes() == here.latest.read_bytes()


@needs_ray
def test_ray_that_was_started_here_listens_to_this_machine_alone(home):
    addresses = addresses_of(processes_below(home._process.process.pid), LISTENING)
    assert len(addresses) >= 3
    assert set(addresses) <= THIS_MACHINE


@needs_ray
def test_what_the_cluster_cannot_hold_or_is_not_there_is_refused(home):
    with pytest.raises(ConfigError, match=r"workers is 3, and the machines .* have CPU for 2"):
        RayWorkers(builders.add_worker, 3, home.address)
    with pytest.raises(ConfigError, match=r"Ray at 127.0.0.1:1 cannot be joined: .*refused"):
        RayWorkers(builders.add_worker, 1, "127.0.0.1:1")
    with pytest.raises(ConfigError, match="'ray://somewhere'; expected HOST:PORT"):
        RayWorkers(builders.add_worker, 1, "ray://somewhere")


@needs_ray
def test_nothing_but_the_cluster_is_left_of_a_killed_run(home, tmp_path):
    run, log = RunDirectory(tmp_path / "run"), tmp_path / "log"
    options = [*RUN, "--steps", "1000", "--output", str(run.path)]
    prepare = partial(take_environment, dict(os.environ))
    process, _ = start_command(
        [*options, "--workers", "1", "--ray", home.address], log, prepare=prepare
    )
    wait_for_rows(run, 1, process)
    (actor,) = actors()
    below = [actor, *processes_below(actor), *processes_below(process.pid)]
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    wait_until_gone(below, 10, log)
    assert Path(f"/proc/{home._process.process.pid}").exists()


@needs_ray
def test_the_tasks_of_an_actor_that_is_killed_are_played_again(
    crew, policy, notes, tmp_path, capsys
):
    tasks = tasks_that("add", "add")
    assert rollouts_of(play(crew, job_of(tasks))[0].groups) == rollouts_of(
        in_process(tasks, policy)
    )
    tasks = tasks_that("hang once", "add", mark=str(tmp_path / "mark"))
    crew.submit(job_of(tasks))
    while not (tmp_path / "mark").exists():
        assert crew.completed(wait=False) == []
    (actor,) = actors()
    below = processes_below(actor)
    os.kill(actor, signal.SIGKILL)
    (done,) = crew.completed(wait=True)
    assert rollouts_of(done.groups) == rollouts_of(one_by_one(tasks, policy))
    assert {rollout.version for group in done.groups for rollout in group.rollouts} == {3}
    assert "its Ray actor (The actor is dead because its worker process has died)" in notes[-1]
    assert notes[-1].endswith("It starts again, and its tasks are played again one by one")
    assert not any(Path(f"/proc/{one}").exists() for one in below)
    assert capsys.readouterr().out == ""


@needs_ray
def test_a_task_that_ends_two_workers_is_given_up(crew, policy, notes):
    tasks = tasks_that("die", "add")
    done = play(crew, job_of(tasks))
    assert done[0].given_up == [tasks[0]]
    whole = one_by_one(tasks, policy)
    assert rollouts_of(done[0].groups) == rollouts_of(whole[1:])
    assert "died of SIGKILL on the machine" in notes[-1]


@needs_ray
def test_the_error_of_a_reward_ends_the_run_and_names_the_machine(crew):
    crew.submit(job_of(tasks_that("fail")))
    with pytest.raises(RewardError, match=r"on the machine .*the reward of the user is broken"):
        while True:
            crew.completed(wait=True)


@needs_ray
def test_nothing_is_left_of_a_killed_run_that_started_ray(tmp_path):
    run, log = RunDirectory(tmp_path / "run"), tmp_path / "log"
    options = [*RUN, "--steps", "1000", "--output", str(run.path)]
    process, _ = start_command([*options, "--workers", "1", "--ray", "local"], log)
    wait_for_rows(run, 1, process)
    below = processes_below(process.pid)
    assert len(below) >= 10
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    wait_until_gone(below, 10, log)


@needs_ray
def test_ray_that_was_imported_in_another_way_cannot_be_started_here(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", import_ray())
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    with pytest.raises(ConfigError, match="Ray was imported before the run could start it"):
        LocalRay(1)
