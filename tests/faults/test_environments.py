"""Environments that fail: each failure is a case of `on_error`, and costs its own episode."""

from itertools import islice

import numpy as np
import pytest

from textpolicy.environments import ChatEnv, load, sum_turn_rewards
from textpolicy.environments.bridges.gymnasium import skip_faulty_seeds
from textpolicy.environments.check_env import check_env
from textpolicy.environments.environment import Environment, GeneratedTasks
from textpolicy.errors import RewardError, TaskError
from textpolicy.generation.scripted import ScriptedPolicy
from textpolicy.rewards import Rewards, scorer_of
from textpolicy.rollout.worker import collect
from textpolicy.types import StopReason, Task


class Odd(BaseException):
    """An error that no `except Exception` catches."""


class Game(ChatEnv):
    """A game of two turns. `fault` replaces or raises what `reset`, `step` or `close` gives."""

    def __init__(self, where="", fault=None):
        super().__init__(
            lambda rng: ("x", {}),
            lambda answers, example: "y" if len(answers) < 2 else None,
            turn_reward=lambda answers, example: 0.5,
        )
        self.where, self.fault = where, fault

    def reset(self, **options):
        return self._given("reset", super().reset(**options))

    def step(self, action):
        return self._given("step", super().step(action))

    def close(self):
        self._given("close", None)

    def _given(self, where, values):
        if where != self.where:
            return values
        if isinstance(self.fault, BaseException):
            raise self.fault
        return self.fault(values)


PICKY = """
import gymnasium

class Picky(gymnasium.Env):
    def reset(self, *, seed=None, options=None):
        if seed % 3 == 0:
            raise SystemExit("odd")
        return f"{seed}", {}
"""


def with_value(place, value):
    return lambda values: (*values[:place], value, *values[place + 1 :])


ERRORS = [ZeroDivisionError("no"), StopIteration(), SystemExit(0), Odd("odd")]
RETURNED = {
    "reset": [
        lambda values: None,
        lambda values: values[0],
        with_value(0, 3),
        with_value(0, "another start"),
        with_value(0, "x" * 2_000_000),
        with_value(1, None),
        with_value(1, {"messages": "hello"}),
        with_value(1, {"messages": [{"role": "user"}]}),
    ],
    "step": [
        lambda values: None,
        lambda values: values[:4],
        lambda values: (*values, {}),
        with_value(0, 3),
        with_value(0, None),
        with_value(0, "x" * 2_000_000),
        with_value(0, "\ud800"),
        with_value(1, "1.0"),
        with_value(1, None),
        with_value(1, float("nan")),
        with_value(1, 1e300),
        with_value(1, 1j),
        with_value(2, "False"),
        with_value(2, None),
        with_value(3, 0),
        with_value(4, None),
        with_value(4, {"metrics": {"a": "high"}}),
        with_value(4, {"metrics": [1]}),
        with_value(4, {"messages": [("user", "hello")]}),
    ],
    "close": [],
}
FAULTS = [(where, fault) for where in RETURNED for fault in [*ERRORS, *RETURNED[where]]]


def play(load_tiny, makers, rewards=sum_turn_rewards, **options):
    """Return the rollouts of one group of one for each maker of a game."""
    _, tokenizer = load_tiny()
    tasks = [Task(id=f"game/{n}", prompt="x", env=make) for n, make in enumerate(makers)]
    policy = ScriptedPolicy(tokenizer, [["say"]] * len(tasks))
    groups = collect(tasks, policy, rewards, group_size=1, seed=0, **options)
    return [rollout for group in groups for rollout in group.rollouts]


@pytest.mark.proves("F21")
@pytest.mark.parametrize("on_error", ["skip", -1.0])
def test_every_failure_of_an_environment_costs_its_own_episode(load_tiny, on_error, attempts):
    lost = None if on_error == "skip" else on_error
    makers = [lambda w=where, f=fault: Game(w, f) for where, fault in FAULTS]
    with scorer_of(Rewards(sum_turn_rewards, on_error=on_error, max_error_rate=1)) as scorer:
        first, *faulty, last = play(load_tiny, [Game, *makers, Game], scorer)
    attempts(len(faulty))
    assert first.reward == last.reward == 1.0
    for (where, _), number, rollout in zip(FAULTS, range(1, 100), faulty, strict=False):
        assert rollout.reward == lost
        assert rollout.error.startswith(f"environment game/{number}, ")
        assert (where if where != "step" else "turn 1, on 'say': ") in rollout.error
        assert len(rollout.error) < 300


@pytest.mark.proves("F21")
@pytest.mark.parametrize("place", range(len(FAULTS)))
def test_a_failure_of_an_environment_ends_the_run_if_on_error_is_fail(load_tiny, place, attempts):
    attempts.add()
    with pytest.raises(TaskError, match=r"^environment game/1, "):
        play(load_tiny, [Game, lambda: Game(*FAULTS[place])])


@pytest.mark.proves("F21")
def test_an_environment_that_always_fails_ends_the_run_after_twenty_episodes(load_tiny, attempts):
    attempts(30)
    incidents = []
    rewards = Rewards(sum_turn_rewards, on_error="skip")
    with scorer_of(rewards) as scorer:
        scorer._on_incident = incidents.append
        play(load_tiny, [Game, *[lambda: Game("step", Odd("odd"))] * 9], scorer)
        with pytest.raises(RewardError, match=r"21 of the last .* environments failed, .*Odd: odd"):
            play(load_tiny, [lambda: Game("step", Odd("odd"))] * 20, scorer)
    (incident,) = incidents
    assert str(incident).endswith("Odd: odd (and 8 more)")


@pytest.mark.proves("F21")
def test_an_episode_that_never_ends_is_cut_off_and_counted(load_tiny, attempts):
    attempts.add()
    endless = lambda: Game("step", with_value(2, False))  # noqa: E731
    (rollout,) = play(load_tiny, [endless], max_turns=5)
    assert (len(rollout.turns), rollout.stop_reason) == (5, StopReason.LENGTH)
    assert rollout.metrics["env/turns"] == 5


@pytest.mark.proves("F21")
def test_numpy_numbers_and_flags_are_accepted(load_tiny, attempts):
    attempts.add()

    def of_numpy(values):
        text, reward, over, *_ = values
        return text, np.float32(reward), np.bool_(over), False, {"metrics": {"n": np.int64(3)}}

    (rollout,) = play(load_tiny, [lambda: Game("step", of_numpy)])
    assert (rollout.reward, rollout.metrics["env/n"], rollout.error) == (1.0, 3.0, None)


def test_an_episode_that_edits_its_example_changes_no_other_episode(load_tiny):
    example = {"secret": [1]}

    def reply(answers, example):
        example["secret"].append(2)
        answers.clear()

    (rollout,) = play(load_tiny, [lambda: ChatEnv(lambda rng: ("x", example), reply)])
    assert rollout.error is None and example == {"secret": [1]}


def test_seeds_that_cannot_be_drawn_are_passed_over_if_errors_may_be_skipped(tmp_path):
    (tmp_path / "picky.py").write_text(PICKY)
    picky = load(f"{tmp_path}/picky.py")
    with pytest.raises(TaskError, match=r"environment Picky|environment picky, seed \d+: .*odd"):
        list(islice(picky.stream(0), 50))
    patient = skip_faulty_seeds(picky)
    assert len(list(islice(patient.stream(0), 50))) == 50 and len(patient.heldout(9)) == 9
    (tmp_path / "never.py").write_text(PICKY.replace("% 3 == 0", ">= 0"))
    with pytest.raises(TaskError, match="odd"):
        next(skip_faulty_seeds(load(f"{tmp_path}/never.py")).stream(0))


def test_check_env_says_how_an_environment_fails_and_shows_no_traceback():
    for where, fault in FAULTS:
        if where == "close":
            continue
        environment = Environment(
            name="odd",
            tasks=GeneratedTasks(name="odd", draw=lambda rng: (str(rng.random()), {})),
            max_tokens=4,
            make_env=lambda reward, w=where, f=fault: Game(w, f),
            reward=lambda completion: 0.0,
        )
        with pytest.raises(TaskError, match=r"environment odd|gymnasium"):
            check_env(environment, 2)
