"""Dynamic sampling and curricula choose the tasks that the trainer sees."""

import json
from itertools import count, islice

import pytest

from tests.test_loop import ListPolicy
from tests.test_types import rollout
from textpolicy.environments.curriculum import MixedTaskCurriculum
from textpolicy.rollout.dynamic_sampling import collect_with_dynamic_sampling, rewards_differ
from textpolicy.types import Curriculum, RolloutGroup, Task


def group(*rewards: float | None, id: str = "t") -> RolloutGroup:
    members = [rollout(reward=reward) for reward in rewards]
    return RolloutGroup(task=Task(id=id, prompt="p"), rollouts=members)


def refill(mixed: set[int], *, groups: int = 2, rounds: int = 4):
    """Sample tasks 0, 1, 2, ...; only the tasks in `mixed` have rewards that differ."""
    numbers = count()
    asked, seeds = [], []

    def next_tasks(wanted):
        asked.append(wanted)
        return [Task(id=str(n), prompt=str(n)) for n in islice(numbers, wanted)]

    def reward(prompt, completion, example):
        return float(completion == "a" and int(prompt) in mixed)

    def seed_of(done):
        seeds.append(done)
        return done

    policy = ListPolicy(["a", "b"] * 20, version=0)
    result = collect_with_dynamic_sampling(
        next_tasks, policy, reward, groups=groups, group_size=2, round_seed=seed_of, rounds=rounds
    )
    return result, asked, seeds


def test_missing_rewards_do_not_make_rewards_differ():
    assert rewards_differ(group(1.0, 0.0, None))
    assert not rewards_differ(group(0.5, 0.5, None))
    assert not rewards_differ(group(None, None))


def test_groups_with_equal_rewards_are_replaced_until_there_are_enough():
    result, asked, seeds = refill({1, 4})
    assert [g.task.id for g in result.kept] == ["1", "4"]
    assert [g.task.id for g in result.groups] == ["0", "1", "2", "3", "4"]
    assert asked == [2, 1, 1, 1]
    assert seeds == [0, 1, 2, 3]
    assert result.metrics == {"refill/rounds": 4, "refill/dropped": 3}


def test_sampling_stops_as_soon_as_there_are_enough():
    result, asked, _ = refill({0, 1})
    assert asked == [2]
    assert result.metrics == {"refill/rounds": 1, "refill/dropped": 0}


def test_sampling_stops_after_the_last_round():
    result, asked, _ = refill({1}, rounds=3)
    assert asked == [2, 1, 1]
    assert [g.task.id for g in result.kept] == ["1"]


def test_with_one_round_no_group_is_replaced_and_all_are_kept():
    result, asked, _ = refill({1}, rounds=1)
    assert asked == [2]
    assert [g.task.id for g in result.kept] == ["0", "1"]


def test_if_no_group_has_differing_rewards_all_are_kept():
    result, _, _ = refill(set(), rounds=2)
    assert result.kept == result.groups
    assert len(result.kept) == 4


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
