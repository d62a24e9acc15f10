"""Workers that are killed, hang or are given a poison task lose no rollout and play none twice."""

import os
import signal
import stat
import time
from dataclasses import replace
from itertools import count, islice

import pytest

from tests.rollout.executors import builders
from textpolicy.environments import load
from textpolicy.errors import AdapterError, ConfigError, RewardError, TrainingError
from textpolicy.rollout.executors.crew import GIVEN_UP, Crew, WorkersLostError
from textpolicy.rollout.executors.executor import RolloutJob
from textpolicy.rollout.executors.followed_versions import FollowedVersions
from textpolicy.rollout.executors.rollout_worker import RolloutWorker
from textpolicy.rollout.executors.spawned import SpawnedWorkers
from textpolicy.rollout.worker import collect
from textpolicy.types import RolloutGroup, Task

GROUP_SIZE = 2
DEADLINE = 3.0


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Return the file of adapters that have moved, as version 3."""
    _, adapters, _ = builders.adapted_model()
    path = tmp_path_factory.mktemp("published") / "adapters.safetensors"
    adapters.swap({n: x + 0.02 for n, x in adapters.parameters().items()}, version=3)
    adapters.publish(path)
    return path


@pytest.fixture(scope="module")
def notes():
    return []


@pytest.fixture(scope="module")
def crew(tmp_path_factory, published, notes):
    """Return two workers for all tests of the file; their start takes seconds."""
    folder = tmp_path_factory.mktemp("crew") / "workers"
    crew = Crew(
        SpawnedWorkers(builders.add_worker), 2, folder, deadline=DEADLINE, note=notes.append
    )
    crew.follow(3, published)
    yield crew
    crew.close()


@pytest.fixture(scope="module")
def policy(published):
    policy = builders.add_policy()
    policy.reload(published)
    return policy


numbers = count()


def tasks_that(*deeds, **columns):
    """Return a new task for each deed."""
    stream = islice(load("add").stream(5), next(numbers) * 10, None)
    return [
        replace(task, id=f"{task.id}-{deed}", example=dict(task.example) | columns | {"do": deed})
        for deed, task in zip(deeds, stream, strict=False)
    ]


def play(crew, *jobs):
    """Return the finished jobs by their numbers, after the last of them has finished."""
    for job in jobs:
        crew.submit(job)
    done = []
    while len(done) < len(jobs):
        done += crew.completed(wait=True)
    assert crew.completed(wait=True) == []
    return {one.job.number: one for one in done}


def job_of(tasks, number=0, first=0):
    return RolloutJob(number=number, tasks=tasks, group_size=GROUP_SIZE, seed=11, first=first)


def rollouts_of(groups):
    return [
        [(r.tokens, r.mask, r.logprobs, r.reward, r.rewards, r.version, r.stop_reason, r.sampling)]
        for group in groups
        for r in group.rollouts
    ]


def in_process(tasks, policy, **options):
    """Return the groups of this process, where the deeds of the tasks are not done."""
    plain = [replace(task, example=dict(task.example) | {"do": "add"}) for task in tasks]
    return collect(plain, policy, builders.obey, group_size=GROUP_SIZE, seed=11, **options)


def process_of(crew, number=1):
    """Return the id of a worker's process, which is below its guard."""
    guard = crew._workers[number - 1].link.process.process.pid
    with open(f"/proc/{guard}/task/{guard}/children") as file:
        return int(file.read().split()[0])


def wait_until_ready(crew):
    while not all(worker.ready for worker in crew._workers):
        crew.completed(wait=False)
        time.sleep(0.01)


def test_workers_sample_the_rollouts_of_this_process_with_the_published_version(crew, policy):
    tasks = tasks_that(*["add"] * 4)
    halves = job_of(tasks[:2], number=1), job_of(tasks[2:], number=2, first=2)
    done = play(crew, *halves)
    expected = in_process(tasks, policy)
    assert rollouts_of([*done[1].groups, *done[2].groups]) == rollouts_of(expected)
    assert [group.task for group in done[2].groups] == tasks[2:]
    assert all(one.seconds > one.reward_seconds > 0 for one in done.values())
    assert {r.version for group in expected for r in group.rollouts} == {3}


def test_a_worker_that_is_killed_before_a_job_is_replaced_in_seconds(crew, policy, notes):
    wait_until_ready(crew)
    for number in (1, 2):
        os.kill(process_of(crew, number), signal.SIGKILL)
    tasks, started = tasks_that("add"), time.monotonic()
    done = play(crew, job_of(tasks))
    assert rollouts_of(done[0].groups) == rollouts_of(in_process(tasks, policy))
    assert time.monotonic() - started < 5
    assert notes[-1] == "rollout worker 2 died of SIGKILL. It starts again"


def test_the_tasks_of_a_worker_that_is_killed_during_a_job_are_played_again(
    crew, policy, notes, tmp_path
):
    tasks = tasks_that("add", "die once", "add", mark=str(tmp_path / "mark"))
    done = play(crew, job_of(tasks))
    assert rollouts_of(done[0].groups) == rollouts_of(in_process(tasks, policy))
    assert done[0].given_up == []
    assert "while it played a job of 3 tasks. It starts again, and its tasks are played again" in (
        notes[-1]
    )


def test_a_job_whose_answer_was_sent_before_the_worker_was_killed_is_not_played_again(crew, policy):
    wait_until_ready(crew)
    tasks, ended = tasks_that("add", "add"), crew.ended
    crew.submit(job_of(tasks))
    crew.completed(wait=False)
    (busy,) = [worker for worker in crew._workers if worker.sent]
    crew._transport.wait([busy.link], 60)
    os.kill(process_of(crew, busy.number), signal.SIGKILL)
    (done,) = crew.completed(wait=True)
    assert rollouts_of(done.groups) == rollouts_of(in_process(tasks, policy))
    while crew.ended == ended:
        assert crew.completed(wait=False) == []


def test_a_task_that_ends_two_workers_is_given_up_and_the_others_go_on(crew, policy, notes):
    tasks = tasks_that("add", "die", "add")
    ended = crew.ended
    done = play(crew, job_of(tasks))
    assert done[0].given_up == [tasks[1]]
    assert [group.task for group in done[0].groups] == [tasks[0], tasks[2]]
    whole = in_process(tasks, policy)
    assert rollouts_of(done[0].groups) == rollouts_of([whole[0], whole[2]])
    assert crew.ended - ended == 2
    assert "2 workers have ended with it" in notes[-1]
    assert str(crew.quarantine.path) in notes[-1]
    # It is not tried again, and a resumed run knows it.
    again = play(crew, job_of(tasks[1:]))
    assert again[0].given_up == [tasks[1]]
    assert rollouts_of(again[0].groups) == rollouts_of(in_process(tasks[2:], policy, first=1))
    assert crew.ended - ended == 2
    assert tasks[1] in type(crew.quarantine)(crew.quarantine.path)
    assert stat.S_IMODE(crew.quarantine.path.stat().st_mode) == 0o600
    assert crew.quarantine.path.name == GIVEN_UP


def test_a_worker_that_hangs_is_ended_at_the_deadline(crew, policy, notes, tmp_path):
    tasks = tasks_that("hang once", mark=str(tmp_path / "mark"))
    ended, started = crew.ended, time.monotonic()
    done = play(crew, job_of(tasks))
    assert rollouts_of(done[0].groups) == rollouts_of(in_process(tasks, policy))
    assert DEADLINE < time.monotonic() - started < DEADLINE + 5
    assert crew.ended == ended + 1
    assert "took longer than 3 s for its job and was ended, while it played task" in notes[-1]
    assert notes[-1].endswith("It starts again, and the task is played again")


def test_a_restarted_worker_has_the_newest_version_before_its_first_job(crew, policy):
    crew.restart(1)
    crew.restart(2)
    tasks = tasks_that("add")
    done = play(crew, job_of(tasks))
    assert rollouts_of(done[0].groups) == rollouts_of(in_process(tasks, policy))


def test_the_error_of_a_reward_ends_the_run_with_its_message(crew):
    crew.submit(job_of(tasks_that("fail")))
    with pytest.raises(RewardError, match="the reward of the user is broken"):
        while True:
            crew.completed(wait=True)
