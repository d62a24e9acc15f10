"""Any split of tasks into jobs gives the rollouts of one call, and this process plays the jobs."""

from contextlib import closing
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from tests.environments.test_episodes import guessing, task_of
from tests.test_loop import ListPolicy
from textpolicy.environments import sum_turn_rewards
from textpolicy.errors import TrainingError
from textpolicy.generation.mlx_generation import create_policy
from textpolicy.generation.scripted import ScriptedPolicy
from textpolicy.rewards import Rewards, Scorer
from textpolicy.rollout.executors.executor import Executor, RolloutJob
from textpolicy.rollout.executors.in_process import InProcessExecutor
from textpolicy.rollout.worker import collect
from textpolicy.types import RolloutGroup, Task

SPLITS = [[1, 2, 3, 4], [3], [2]]
QUESTIONS = [Task(id=str(n), prompt="7" * n + "+1=") for n in range(5)]
GAMES = [task_of(lambda n=n: guessing(2, prompt="7" * n + "?"), str(n)) for n in range(5)]


def digits(completion):
    return sum(map(str.isdigit, completion)) / 4


def play(tasks, policy, reward, splits=()) -> list[RolloutGroup]:
    """Play the tasks as jobs that begin at the places `splits`, the last job first."""
    places = [*pairwise([0, *splits, len(tasks)])]
    with closing(Scorer(Rewards(reward))) as scorer:
        executor = InProcessExecutor(policy, scorer)
        for number, (first, end) in reversed([*enumerate(places)]):
            job = RolloutJob(
                number=number, tasks=tasks[first:end], group_size=3, seed=9, first=first
            )
            executor.submit(job)
        ended = [job for _ in places for job in executor.completed(wait=True)]
        assert executor.completed(wait=True) == []
    return [group for one in sorted(ended, key=lambda one: one.job.number) for group in one.groups]


def assert_same_rollouts(groups: list[RolloutGroup], others: list[RolloutGroup]) -> None:
    """Compare all but the last bits of log-probabilities, in which a batch may round otherwise."""
    for group, other in zip(groups, others, strict=True):
        assert group.task == other.task
        for one, two in zip(group.rollouts, other.rollouts, strict=True):
            np.testing.assert_allclose(one.logprobs, two.logprobs, rtol=0, atol=1e-4)
            assert replace(one, logprobs=two.logprobs) == two


@pytest.mark.parametrize(
    ("tasks", "reward"), [(QUESTIONS, digits), (GAMES, sum_turn_rewards)], ids=["answers", "games"]
)
def test_any_split_of_tasks_into_jobs_gives_the_rollouts_of_one_call(load_tiny, tasks, reward):
    policy = create_policy(*load_tiny(), {"max_tokens": 6})
    together = collect(tasks, policy, reward, group_size=3, seed=9)
    assert len({tuple(r.tokens) for group in together for r in group.rollouts}) > len(tasks)
    for splits in SPLITS:
        assert_same_rollouts(play(tasks, policy, reward, splits), together)


@pytest.mark.parametrize(
    ("tasks", "reward"), [(QUESTIONS, digits), (GAMES, sum_turn_rewards)], ids=["answers", "games"]
)
def test_a_split_keeps_the_script_of_each_task(load_tiny, tasks, reward):
    _, tokenizer = load_tiny()
    policy = ScriptedPolicy(tokenizer, [[f"{n}", f"and {n}"] for n in range(5)])
    split = play(tasks, policy, reward, [2, 3])
    assert split == play(tasks, policy, reward)
    last = "and {}" if tasks is GAMES else "{}"
    assert [group.rollouts[0].completion for group in split] == [last.format(n) for n in range(5)]


def test_a_policy_without_places_plays_whole_seeds():
    groups = play(QUESTIONS, ListPolicy(["1", "2"]), digits)
    assert [r.completion for g in groups for r in g.rollouts] == ["1", "2"] * 7 + ["1"]


def test_a_job_is_played_when_it_is_waited_for_with_the_adapters_of_that_moment(tmp_path):
    class Reloadable(ListPolicy):
        def reload(self, path):
            self.version = int(path.name)

    policy = Reloadable(["1"])
    with closing(Scorer(Rewards(digits))) as scorer:
        executor = InProcessExecutor(policy, scorer)
        assert isinstance(executor, Executor)
        executor.submit(RolloutJob(number=0, tasks=QUESTIONS, group_size=1, seed=0))
        assert executor.completed(wait=False) == []
        executor.follow(3, tmp_path / "3")
        (finished,) = executor.completed(wait=True)
        assert {group.version for group in finished.groups} == {3}
        assert 0 < finished.reward_seconds < finished.seconds
        executor.submit(RolloutJob(number=1, tasks=QUESTIONS, group_size=1, seed=0))
        executor.close()
        assert executor.completed(wait=True) == []
        with pytest.raises(TrainingError, match="generates with version 3 after reloading"):
            policy.reload = lambda path: None
            executor.follow(4, tmp_path / "4")
