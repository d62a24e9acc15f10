"""Workers that are killed, hang or are given a poison task lose no rollout and play none twice."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from itertools import count, islice

import mlx.core as mx
import pytest

from tests.rollout.executors import builders
from tests.rollout.executors.processes import cpu_seconds_of, process_of
from textpolicy.environments import load
from textpolicy.errors import (
    AdapterError,
    ConfigError,
    RewardError,
    TooManyFailuresError,
    TrainingError,
    UnreadableError,
)
from textpolicy.rollout.executors import crew as crew_module
from textpolicy.rollout.executors.crew import Crew, WorkersLostError
from textpolicy.rollout.executors.executor import RolloutJob
from textpolicy.rollout.executors.followed_versions import FollowedVersions
from textpolicy.rollout.executors.rollout_worker import RolloutWorker, as_it_is
from textpolicy.rollout.executors.spawned import SpawnedWorkers
from textpolicy.rollout.executors.worker_link import (
    Failed,
    PlayedJob,
    WorkerEndedError,
    answer_from_json,
    answer_to_json,
    receive_tasks,
    send_job,
)
from textpolicy.rollout.worker import collect
from textpolicy.runs.directory import GIVEN_UP
from textpolicy.types import Rollout, Sampling, StopReason

GROUP_SIZE = 2
SCRIPT = """from contextlib import closing
from itertools import islice
from pathlib import Path
from textpolicy.environments import load
from textpolicy.rollout.executors.crew import Crew
from textpolicy.rollout.executors.executor import RolloutJob
from textpolicy.rollout.executors.rollout_worker import RolloutWorker
from textpolicy.rollout.executors.spawned import SpawnedWorkers
import textpolicy as tp

class Number(int):
    pass

def own_reward(completion, example):
    return float(type(example["own"]).__name__ == "Number")

def build():
    model, tokenizer = tp.load_model("tiny")
    tp.AdapterContainer.from_model(model, tp.AdapterConfig(rank=2))
    return RolloutWorker(tp.create_policy(model, tokenizer, {"max_tokens": 3}), own_reward)

def main():
    model, _ = tp.load_model("tiny")
    adapters = tp.AdapterContainer.from_model(model, tp.AdapterConfig(rank=2))
    adapters.publish(published := Path("adapters.safetensors"))
    with closing(Crew(SpawnedWorkers(build), 1, Path("workers"))) as crew:
        crew.follow(0, published)
        tasks = [tp.Task(id="1", prompt="1+1=", example={"own": Number(3)})]
        crew.submit(RolloutJob(number=0, tasks=tasks, group_size=2, seed=0))
        (done,) = crew.completed(wait=True)
        print([rollout.reward for group in done.groups for rollout in group.rollouts])
"""
DEADLINE = 4.0


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Return the file of adapters that have moved, as version 3."""
    model, adapters, _ = builders.adapted_model()
    path = tmp_path_factory.mktemp("published") / "adapters.safetensors"
    adapters.swap({n: x + 0.02 for n, x in adapters.parameters().items()}, version=3)
    adapters.publish(path)
    del model
    return path


@pytest.fixture(scope="module")
def notes():
    return []


@pytest.fixture(scope="module")
def crew(tmp_path_factory, published, notes):
    """Return two workers for all tests of the file; their start takes seconds."""
    folder = tmp_path_factory.mktemp("crew") / "workers"
    crew = Crew(SpawnedWorkers(builders.add_worker), 2, folder, note=notes.append)
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


def one_by_one(tasks, policy):
    """Return the groups of this process, each sampled in a batch of its own.

    The size of a batch changes the last digits of log-probabilities, and no token.
    """
    return [group for n, task in enumerate(tasks) for group in in_process([task], policy, first=n)]


def tokens_of(groups):
    return [[rollout.tokens for rollout in group.rollouts] for group in groups]


def wait_until_replaced(crew):
    ended = crew.ended
    while crew.ended == ended:
        assert crew.completed(wait=False) == []
        time.sleep(0.01)


def wait_until_ready(crew):
    while not all(worker.ready for worker in crew._workers):
        crew.completed(wait=False)
        time.sleep(0.01)


def test_workers_sample_the_rollouts_of_this_process_with_the_published_version(crew, policy):
    tasks = tasks_that(*["add"] * 4)
    halves = job_of(tasks[:2], number=1), job_of(tasks[2:], number=2, first=2)
    done = play(crew, *halves)
    expected = [*in_process(tasks[:2], policy), *in_process(tasks[2:], policy, first=2)]
    groups = [*done[1].groups, *done[2].groups]
    assert rollouts_of(groups) == rollouts_of(expected)
    assert tokens_of(groups) == tokens_of(in_process(tasks, policy))
    assert [group.task for group in done[2].groups] == tasks[2:]
    assert all(one.seconds > one.reward_seconds > 0 for one in done.values())
    assert {r.version for group in expected for r in group.rollouts} == {3}


@pytest.mark.proves("F8")
def test_a_worker_that_is_killed_before_a_job_is_back_in_seconds(crew, policy, notes):
    wait_until_ready(crew)
    before = cpu_seconds_of(process_of(crew, 2))
    os.kill(process_of(crew, 2), signal.SIGKILL)
    wait_until_replaced(crew)
    assert notes[-1] == "rollout worker 2 died of SIGKILL. It starts again"
    wait_until_ready(crew)
    # Not the seconds of the clock: a busy machine starts a process slowly. On a GPU each process
    # also makes kernels ready, as the killed one did.
    limit = 4 if mx.default_device().type == mx.cpu else max(4, 1.5 * before)
    assert cpu_seconds_of(process_of(crew, 2)) < limit
    tasks = tasks_that("add", "add")
    done = play(crew, job_of(tasks[:1], number=1), job_of(tasks[1:], number=2, first=1))
    groups = [*done[1].groups, *done[2].groups]
    assert rollouts_of(groups) == rollouts_of(one_by_one(tasks, policy))
    assert {done[1].worker, done[2].worker} == {1, 2}


@pytest.mark.proves("F8")
def test_the_tasks_of_a_worker_that_is_killed_during_a_job_are_played_again(
    crew, policy, notes, tmp_path
):
    tasks = tasks_that("add", "die once", "add", mark=str(tmp_path / "mark"))
    done = play(crew, job_of(tasks))
    assert rollouts_of(done[0].groups) == rollouts_of(one_by_one(tasks, policy))
    assert (done[0].given_up, done[0].ended) == ([], 1)
    assert (
        "while it played a job of 3 tasks. It starts again, and its tasks are played again"
        in (notes[-1])
    )


@pytest.mark.proves("F8")
def test_a_job_whose_answer_was_sent_before_the_worker_was_killed_is_not_played_again(crew, policy):
    wait_until_ready(crew)
    tasks = tasks_that("add", "add")
    crew.submit(job_of(tasks))
    crew.completed(wait=False)
    (busy,) = [worker for worker in crew._workers if worker.sent]
    crew._transport.wait([busy.link], 60)
    os.kill(process_of(crew, busy.number), signal.SIGKILL)
    (done,) = crew.completed(wait=True)
    assert rollouts_of(done.groups) == rollouts_of(in_process(tasks, policy))
    wait_until_replaced(crew)
    assert crew.completed(wait=False) == []


@pytest.mark.proves("F9")
def test_a_task_that_ends_two_workers_is_given_up_and_the_others_go_on(crew, policy, notes):
    tasks = tasks_that("add", "die", "add")
    ended = crew.ended
    done = play(crew, job_of(tasks))
    assert (done[0].given_up, done[0].ended) == ([tasks[1]], 2)
    assert [group.task for group in done[0].groups] == [tasks[0], tasks[2]]
    whole = one_by_one(tasks, policy)
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


@pytest.mark.slow
def test_deadly_tasks_beside_each_other_are_given_up_and_end_the_run_only_if_there_are_many(
    tmp_path, published, monkeypatch
):
    alone = Crew(SpawnedWorkers(builders.add_worker), 1, tmp_path / "workers")
    with closing(alone):
        alone.follow(3, published)
        tasks = tasks_that("die", "die", "die", "add")
        done = play(alone, job_of(tasks))
        assert done[0].given_up == tasks[:3]
        assert alone.ended == 4
        monkeypatch.setattr(crew_module, "_GIVEN_UP_IN_A_ROW", 2)
        alone.submit(job_of(tasks_that("die", "die", "add")))
        with pytest.raises(WorkersLostError, match="2 tasks in a row were given up"):
            while True:
                alone.completed(wait=True)


def test_a_job_begins_when_it_is_submitted(crew):
    """The trainer may update for long before it asks what has finished."""
    wait_until_ready(crew)
    crew.submit(job_of(tasks_that("add")))
    assert sum(len(worker.sent) for worker in crew._workers) == 1
    crew.completed(wait=True)


@pytest.mark.proves("F10")
def test_a_worker_that_hangs_is_ended_at_the_deadline(crew, policy, notes, tmp_path, monkeypatch):
    wait_until_ready(crew)
    monkeypatch.setattr(crew, "_deadline", DEADLINE)
    tasks = tasks_that("hang once", mark=str(tmp_path / "mark"))
    ended, started = crew.ended, time.monotonic()
    done = play(crew, job_of(tasks))
    assert rollouts_of(done[0].groups) == rollouts_of(in_process(tasks, policy))
    assert time.monotonic() - started > DEADLINE
    assert crew.ended == ended + 1
    assert "took longer than 4 s for its job and was ended, while it played task" in notes[-1]
    assert notes[-1].endswith("It starts again, and the task is played again")


@pytest.mark.proves("F17")
def test_a_restarted_worker_has_the_newest_version_before_its_first_job(crew, policy):
    crew.restart(1)
    wait_until_ready(crew)
    tasks = tasks_that("add", "add")
    done = play(crew, job_of(tasks[:1], number=1), job_of(tasks[1:], number=2, first=1))
    assert {done[1].worker, done[2].worker} == {1, 2}
    groups = [*done[1].groups, *done[2].groups]
    assert rollouts_of(groups) == rollouts_of(one_by_one(tasks, policy))


@pytest.mark.slow
def test_a_worker_that_ends_three_times_in_a_row_ends_the_run(tmp_path, published):
    lost = Crew(SpawnedWorkers(builders.dying_worker), 1, tmp_path / "workers")
    lost.follow(3, published)
    lost.submit(job_of(tasks_that("add")))
    with pytest.raises(WorkersLostError, match=r"exited with code 9.*3 times in a row"):
        lost.completed(wait=True)
    lost.close()
    assert list((tmp_path / "workers").iterdir()) == []


def test_the_error_of_a_worker_that_cannot_be_built_ends_the_run(tmp_path, published, capfd):
    """What the user's code prints in the worker goes where this process prints."""
    refusing = Crew(SpawnedWorkers(builders.refusing_worker), 1, tmp_path / "workers")
    refusing.follow(3, published)
    refusing.submit(job_of(tasks_that("add")))
    with pytest.raises(ConfigError, match="the worker has no model"):
        refusing.completed(wait=True)
    refusing.close()
    assert capfd.readouterr() == ("printed in a worker\n", "an error in a worker\n")


def test_what_another_process_cannot_find_is_refused(crew, tmp_path, published):
    with pytest.raises(ConfigError, match="handing the function that builds a rollout worker"):
        SpawnedWorkers(lambda: builders.add_worker())
    (task,) = tasks_that("add", column=lambda: None)
    with pytest.raises(ConfigError, match="handing the columns of a task to a rollout worker"):
        crew._workers[0].link.play(send_job(job_of([task]), 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "said"),
    [
        ('if __name__ == "__main__":\n    main()\n', "[1.0, 1.0]"),
        ("main()\n", 'put the code that starts the run under `if __name__ == "__main__":`'),
    ],
    ids=["guarded", "not guarded"],
)
def test_a_worker_finds_what_a_script_defines_if_its_run_is_guarded(tmp_path, start, said):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + start)
    result = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert said in result.stdout + result.stderr


@pytest.mark.proves("F17")
def test_a_file_that_does_not_hold_the_published_version_is_refused(tmp_path, published):
    versions = FollowedVersions(tmp_path)
    worker = RolloutWorker(builders.add_policy(seed=7), builders.obey)
    third = versions.add(3, published)
    assert worker.follow(third) == worker.policy.version == 3
    with pytest.raises(AdapterError, match="holds adapter version 3; expected version 4"):
        worker.follow(replace(third, version=4))
    third.path.unlink()
    third.path.write_bytes(published.read_bytes()[:-1] + b"?")
    with pytest.raises(AdapterError, match="holds other bytes than adapter version 3"):
        worker.follow(third)
    third.path.unlink()
    with pytest.raises(UnreadableError, match="cannot be read: No such file"):
        worker.follow(third)


@pytest.mark.proves("F17")
def test_rollouts_of_a_version_that_was_not_published_are_not_taken(crew, published):
    """The trainer has made version 3, and the worker says that its rollouts are of version 4."""
    answer = answer_from_json(json.loads(json.dumps(answer_to_json(answer_of(4)))))
    assert answer == answer_of(4)
    (task,) = tasks_that("add")
    job = replace(job_of([task]), group_size=1)
    crew._check(job, answer_of(3))
    with pytest.raises(WorkerEndedError, match="version 4, which was not published"):
        crew._check(job, answer)
    with pytest.raises(WorkerEndedError, match="expected 1 groups of 2"):
        crew._check(job_of([task]), answer_of(3))


def answer_of(version):
    rollout = Rollout(
        tokens=[1, 2],
        mask=[False, True],
        logprobs=[0.0, -0.1],
        completion="2",
        reward=1.0,
        stop_reason=StopReason.LENGTH,
        sampling=Sampling(stop=("x",)),
        version=version,
        turns=[],
    )
    return PlayedJob(number=1, rollouts=[[rollout]], seconds=0.1, notes=["a note"])


@pytest.mark.parametrize("content", [{}, {"played": 1}, {"ready": 1}, {"played": 1, "rollouts": 3}])
def test_what_is_no_answer_ends_the_worker(content):
    with pytest.raises(WorkerEndedError, match="where an answer was expected"):
        answer_from_json(content)


def test_jobs_need_a_version_and_a_crew_needs_a_worker(tmp_path):
    transport = SpawnedWorkers(builders.refusing_worker)
    with pytest.raises(ConfigError, match="workers is 0; expected at least 1"):
        Crew(transport, 0, tmp_path)
    crew = Crew(transport, 1, tmp_path)
    with closing(crew), pytest.raises(TrainingError, match="know no adapter version"):
        crew.submit(job_of([]))


def test_a_task_that_does_not_get_its_environment_back_is_refused():
    (task,) = islice(load("hilo").stream(0), 1)
    sent = send_job(job_of([task]), 1)
    assert sent.job.tasks[0].env is None
    with pytest.raises(ConfigError, match=f"task {task.id} is played as 'episode'"):
        receive_tasks(sent, as_it_is)
    (again,) = receive_tasks(sent, load("hilo").attach)
    assert again.env is not None


def test_the_error_of_a_reward_ends_the_run_with_its_message(crew):
    crew.submit(job_of(tasks_that("fail")))
    with pytest.raises(RewardError, match="the reward of the user is broken"):
        while True:
            crew.completed(wait=True)


def test_too_many_failures_in_a_worker_are_the_same_error_in_the_run_which_says_how_to_resume():
    told = answer_from_json(answer_to_json(Failed(TooManyFailuresError("21 of the last 21"))))
    assert isinstance(told, Failed) and type(told.error) is TooManyFailuresError
