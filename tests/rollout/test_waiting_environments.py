"""While an environment waits, other rows decode; the rollouts are those of a quick environment."""

import threading
import time
from functools import partial

import pytest

from tests.quick import quick_first
from textpolicy.environments import ChatEnv, sum_turn_rewards
from textpolicy.errors import TaskError
from textpolicy.generation.policy import ModelPolicy
from textpolicy.rewards import Rewards
from textpolicy.rollout.worker import collect
from textpolicy.types import Sampling, Task


class Record:
    """Which environments are in a call now, and the largest number of them."""

    def __init__(self):
        self.lock = threading.Lock()
        self.inside = []
        self.most = 0

    def __call__(self, env, seconds):
        with self.lock:
            assert env not in self.inside, "an environment was called from two threads at once"
            self.inside.append(env)
            self.most = max(self.most, len(self.inside))
        time.sleep(seconds)
        with self.lock:
            self.inside.remove(env)


class Waiting(ChatEnv):
    """A game of `turns` turns, in which reset, step and close each take so many seconds."""

    def __init__(self, record, seconds, turns, fails_at=None):
        super().__init__(
            lambda rng: ("x" * turns, {}),
            lambda answers, example: "again" * (len(answers) % 3) if len(answers) < turns else None,
            turn_reward=lambda answers, example: float(len(answers[-1])),
            max_turns=turns,
        )
        self.wait = lambda: record(self, seconds)
        self.fails_at = fails_at
        self.turn = 0

    def reset(self, *, seed=None, options=None):
        self.wait()
        return super().reset(seed=seed)

    def step(self, action):
        self.wait()
        self.turn += 1
        if self.turn == self.fails_at:
            raise OSError("the server is gone")
        return super().step(action)

    def close(self):
        self.wait()


def tasks_of(record, seconds, **options):
    return [
        Task(
            id=str(number),
            prompt="x" * (2 + number % 4),
            env=partial(Waiting, record, seconds, 2 + number % 4, **options),
        )
        for number in range(8)
    ]


@pytest.fixture(scope="module")
def loaded(load_tiny):
    return load_tiny()


def play(loaded, tasks, max_rows=256, reward=sum_turn_rewards):
    policy = ModelPolicy(*loaded, Sampling(max_tokens=10), seed=0, max_rows=max_rows)
    return collect(tasks, policy, reward, group_size=2, seed=5)


def numbers(groups):
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return [(r.tokens, r.mask, r.reward, r.turns, r.stop_reason, r.metrics) for r in rollouts]


@pytest.fixture(scope="module")
def quick(loaded):
    """The rollouts of environments that do not wait."""
    return numbers(play(loaded, tasks_of(Record(), 0)))


def test_environments_wait_side_by_side_and_the_rollouts_do_not_depend_on_it(loaded, quick):
    record = Record()
    started = time.monotonic()
    assert numbers(play(loaded, tasks_of(record, 0.04))) == quick
    seconds = time.monotonic() - started
    turns = sum(len(rollout[3]) for rollout in quick)
    assert record.most > 8
    assert seconds < 0.04 * (turns + 2 * 16)


@pytest.mark.parametrize("max_rows", quick_first(1, [3, 8]))
def test_rows_wait_for_a_place_while_environments_wait(loaded, quick, max_rows):
    assert numbers(play(loaded, tasks_of(Record(), 0.04), max_rows)) == quick


def test_an_environment_that_fails_in_a_thread_ends_the_run_by_name(loaded):
    record = Record()
    with pytest.raises(
        TaskError, match=r"environment \d, turn 2, on .*OSError: the server is gone"
    ):
        play(loaded, tasks_of(record, 0.04, fails_at=2))
    assert record.most > 1


def test_an_environment_that_fails_in_a_thread_costs_its_rollout_only(loaded, quick):
    tasks = tasks_of(Record(), 0.04)
    tasks[3] = tasks_of(Record(), 0.04, fails_at=2)[3]
    reward = Rewards(sum_turn_rewards, on_error="skip")
    groups = play(loaded, tasks, reward=reward)
    assert all("the server is gone" in rollout.error for rollout in groups[3].rollouts)
    del groups[3]
    assert numbers(groups) == quick[:6] + quick[8:]
