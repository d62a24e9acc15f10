"""Dynamic sampling and curricula choose the tasks that the trainer sees."""

import json
from itertools import count, islice

import pytest

from tests.test_loop import ListPolicy
from tests.test_types import rollout
from textpolicy.buffer import Buffer
from textpolicy.environments.curriculum import MixedTaskCurriculum
from textpolicy.rewards import scorer_of
from textpolicy.rollout.dynamic_sampling import rewards_differ
from textpolicy.rollout.executors.in_process import InProcessExecutor
from textpolicy.rollout.feed import FeedOptions, RolloutFeed
from textpolicy.rollout.task_source import TaskSource
from textpolicy.types import Curriculum, RolloutGroup, Task


def group(*rewards: float | None, id: str = "t") -> RolloutGroup:
    members = [rollout(reward=reward) for reward in rewards]
    return RolloutGroup(task=Task(id=id, prompt="p"), rollouts=members)


def refill(mixed: set[int], *, groups: int = 2, rounds: int = 4):
    """Sample tasks 0, 1, 2, ...; only the tasks in `mixed` have rewards that differ.

    Return what has arrived, the tasks that are kept, and the jobs.
    """
    jobs = []

    class Recording(InProcessExecutor):
        def submit(self, job):
            jobs.append(job)
            super().submit(job)

    def reward(prompt, completion, example):
        return float(completion == "a" and int(prompt) in mixed)

    source, buffer = TaskSource(Task(id=str(n), prompt=str(n)) for n in count()), Buffer()
    options = FeedOptions(steps=1, groups_per_step=groups, group_size=2, refill_rounds=rounds)
    with scorer_of(reward) as scorer:
        executor = Recording(ListPolicy(["a", "b"] * 20), scorer)
        arrived = RolloutFeed(source, executor, buffer, options).fill(0, 0)
    return arrived, [group.task.id for group in buffer.take(0)], jobs


def test_missing_rewards_do_not_make_rewards_differ():
    assert rewards_differ(group(1.0, 0.0, None))
    assert not rewards_differ(group(0.5, 0.5, None))
    assert not rewards_differ(group(None, None))


def test_groups_with_equal_rewards_are_replaced_until_there_are_enough():
    arrived, kept, jobs = refill({1, 4})
    assert kept == ["1", "4"]
    assert [g.task.id for g in arrived.groups] == ["0", "1", "2", "3", "4"]
    assert [len(job.tasks) for job in jobs] == [2, 1, 1, 1]
    assert [job.seed for job in jobs] == [n << 24 for n in range(4)]
    assert arrived.metrics["refill/rounds"] == 4
    assert arrived.metrics["refill/dropped"] == 3


def test_sampling_stops_as_soon_as_there_are_enough():
    arrived, kept, jobs = refill({0, 1})
    assert kept == ["0", "1"] and len(jobs) == 1
    assert arrived.metrics["refill/rounds"] == 1
    assert arrived.metrics["refill/dropped"] == 0


def test_sampling_stops_after_the_last_round():
    _, kept, jobs = refill({1}, rounds=3)
    assert [len(job.tasks) for job in jobs] == [2, 1, 1]
    assert kept == ["1"]


def test_with_one_round_no_group_is_replaced_and_all_are_kept():
    _, kept, jobs = refill({1}, rounds=1)
    assert kept == ["0", "1"] and len(jobs) == 1


def test_if_no_group_has_differing_rewards_all_are_kept():
    _, kept, _ = refill(set(), rounds=2)
    assert kept == ["0", "1", "2", "3"]


def numbered():
    return (Task(id=str(n), prompt="p") for n in count())


def went(curriculum, tasks, *rewards):
    """Each of the tasks got these rewards."""
    groups = [
        RolloutGroup(task=task, rollouts=[rollout(reward=reward) for reward in rewards])
        for task in tasks
    ]
    curriculum.observe(groups)


def test_tasks_that_were_solved_sometimes_are_repeated():
    curriculum = MixedTaskCurriculum(numbered(), share=1.0)
    assert isinstance(curriculum, Curriculum)
    mixed, solved = islice(curriculum, 2)
    went(curriculum, [mixed], 1.0, 0.0)
    went(curriculum, [solved], 1.0, 1.0)
    assert [next(curriculum).id for _ in range(2)] == [mixed.id, "2"]


def after_five_mixed(seed):
    curriculum = MixedTaskCurriculum(numbered(), share=0.5, capacity=3, seed=seed)
    went(curriculum, list(islice(curriculum, 5)), 1.0, 0.0)
    return curriculum


def ids(curriculum, number=12):
    return [next(curriculum).id for _ in range(number)]


def test_a_curriculum_keeps_the_latest_tasks_and_is_repeatable_by_its_seed():
    again = {name for name in ids(after_five_mixed(0)) if int(name) < 5}
    assert again == {"2", "3", "4"}
    assert ids(after_five_mixed(0)) == ids(after_five_mixed(0))
    assert ids(after_five_mixed(0)) != ids(after_five_mixed(1))


def test_a_curriculum_resumes_from_its_state():
    curriculum = after_five_mixed(0)
    went(curriculum, list(islice(curriculum, 3)), 0.0, 1.0)
    state = json.loads(json.dumps(curriculum.state()))
    resumed = MixedTaskCurriculum(numbered(), share=0.5, capacity=3, seed=7)
    resumed.restore(state)
    assert ids(resumed) == ids(curriculum)


def test_with_a_share_of_zero_all_tasks_are_new():
    curriculum = MixedTaskCurriculum(islice(numbered(), 3), share=0.0)
    went(curriculum, [first := next(curriculum)], 1.0, 0.0)
    assert [first.id, *(task.id for task in curriculum)] == ["0", "1", "2"]
    with pytest.raises(StopIteration):
        next(curriculum)
