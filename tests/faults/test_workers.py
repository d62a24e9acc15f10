"""Workers killed at any instant, poison tasks and hangs: no rollout is lost, none comes twice."""

import itertools
import os
import signal
import statistics
import time
from collections import Counter
from dataclasses import replace
from itertools import islice
from random import Random

import pytest

from tests.rollout.executors import builders
from tests.rollout.executors.processes import cpu_seconds_of, process_of
from textpolicy.environments import load
from textpolicy.rollout.executors.crew import Crew
from textpolicy.rollout.executors.executor import RolloutJob
from textpolicy.rollout.executors.spawned import SpawnedWorkers
from textpolicy.rollout.worker import collect

WORKERS, TASKS_OF_A_JOB, GROUP_SIZE = 2, 4, 2
DEADLINE = 20.0


@pytest.fixture
def crew(tmp_path):
    model, adapters, _ = builders.adapted_model()
    adapters.publish(published := tmp_path / "adapters.safetensors")
    del model
    crew = Crew(SpawnedWorkers(builders.add_worker), WORKERS, tmp_path / "crew", deadline=DEADLINE)
    crew.follow(0, published)
    yield crew
    crew.close()


def jobs_with_faults(folder, count, deeds):
    """Yield jobs without end. Of the first `count`, one for each deed has a task that does it."""
    stream = load("add").stream(0)
    tasks = list(islice(stream, count * TASKS_OF_A_JOB))
    between = count // (len(deeds) + 1)
    for number, deed in enumerate(deeds):
        place = (number + 1) * between * TASKS_OF_A_JOB + number % TASKS_OF_A_JOB
        example = dict(tasks[place].example) | {"do": deed, "mark": str(folder / str(number))}
        tasks[place] = replace(tasks[place], example=example)
    for number in itertools.count():
        tasks += islice(stream, TASKS_OF_A_JOB)
        first, tasks = tasks[:TASKS_OF_A_JOB], tasks[TASKS_OF_A_JOB:]
        yield RolloutJob(number=number, tasks=first, group_size=GROUP_SIZE, seed=number)


class Killer:
    """Kills a worker that plays a job at random instants, and measures how soon it is back."""

    def __init__(self, crew, kills):
        self.crew = crew
        self.random = Random(0)
        self.left = kills
        self.down = {}
        self.seconds = []
        self.cpu_seconds = []
        self.plan()

    def plan(self):
        self.next = time.monotonic() + self.random.uniform(0.0, 0.5)

    def look(self):
        """Note who is back, and kill somebody if it is time, unless somebody is down."""
        for number in list(self.down):
            if self.crew._workers[number - 1].ready:
                self.seconds.append(time.monotonic() - self.down.pop(number))
                self.cpu_seconds.append(cpu_seconds_of(process_of(self.crew, number)))
                self.plan()
        if not self.left or self.down or time.monotonic() < self.next:
            return
        # A worker that is killed three times before it finishes a job ends the run, and a task that
        # is killed twice is given up, as they should.
        chosen = self.random.choice(self.crew._workers)
        first_try = chosen.sent and not next(iter(chosen.sent.values())).ended
        if chosen.ready and first_try and not chosen.ends:
            os.kill(process_of(self.crew, chosen.number), signal.SIGKILL)
            self.down[chosen.number] = time.monotonic()
            self.left -= 1
            ended = self.crew.ended
            while self.crew.ended == ended:
                yield from self.crew.completed(wait=False)


@pytest.mark.long
@pytest.mark.parametrize(
    ("count", "kills", "poison", "hangs"),
    [
        pytest.param(60, 20, 5, 3, marks=pytest.mark.proves("F8"), id="all kinds at once"),
        pytest.param(12, 0, 5, 0, marks=pytest.mark.proves("F9"), id="poison"),
        pytest.param(8, 0, 0, 3, marks=pytest.mark.proves("F10"), id="hangs"),
    ],
)
def test_no_rollout_is_lost_or_comes_twice_whatever_happens_to_the_workers(
    crew, tmp_path, attempts, count, kills, poison, hangs
):
    stream = jobs_with_faults(tmp_path, count, ["die"] * poison + ["hang once"] * hangs)
    jobs, done, killer = [], [], Killer(crew, kills)
    while len(done) < max(count, len(jobs)):
        wanted = len(jobs) < count or killer.left or killer.down
        if wanted and len(jobs) - len(done) < 2 * WORKERS:
            jobs.append(next(stream))
            crew.submit(jobs[-1])
        done += killer.look()
        done += crew.completed(wait=False)
        time.sleep(0.002)
    assert killer.left == 0
    assert Counter(one.job.number for one in done) == Counter(range(len(jobs)))
    given_up = {task.id for one in done for task in one.given_up}
    deadly = {task.id for job in jobs for task in job.tasks if task.example.get("do") == "die"}
    assert len(deadly) == poison
    assert given_up == deadly
    ids = [group.task.id for one in done for group in one.groups]
    assert sorted([*ids, *given_up]) == sorted(task.id for job in jobs for task in job.tasks)
    # A kill may come before a task ends its worker itself.
    assert crew.ended >= (kills + poison if kills else 2 * poison + hangs)
    policy = builders.add_policy()
    for one in done:
        if not one.given_up:
            expected = collect(
                [
                    replace(task, example=dict(task.example) | {"do": "add"})
                    for task in one.job.tasks
                ],
                policy,
                builders.obey,
                group_size=GROUP_SIZE,
                seed=one.job.seed,
            )
            assert tokens_of(one.groups) == tokens_of(expected)
    if kills:
        assert max(killer.cpu_seconds) < 4
        # On a machine with other work a process starts slowly, whatever it does.
        if os.getloadavg()[0] < (os.cpu_count() or 1) + WORKERS + 1:
            assert statistics.median(killer.seconds) < 5, killer.seconds
    attempts(kills or poison or hangs)


def tokens_of(groups):
    return [[rollout.tokens for rollout in group.rollouts] for group in groups]
