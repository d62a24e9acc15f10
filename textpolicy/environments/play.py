"""Play episodes with fixed answers or with the environment's own gold answers."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from textpolicy.environments.chat import gold_for_turn
from textpolicy.environments.environment import Environment, opening_prompt
from textpolicy.environments.faults import environment_errors
from textpolicy.errors import TaskError
from textpolicy.types import Task, TextEnv

_MAX_TURNS = 200


def gold_answers(environment: Environment, task: Task) -> list[str]:
    """Return one gold answer a turn: from `environment.gold`, or from the infos of an episode."""
    if environment.gold is not None:
        gold = environment.gold(task.example)
        return [gold] if isinstance(gold, str) else gold
    if task.env is None:
        raise TaskError(
            f"environment {environment.name} has no gold answers. Write a function gold(example)"
        )
    answers, _ = play_episode(task.env, None, seed=task.seed, name=task.id)
    return answers


def play_episode(
    make_env: Callable[[], TextEnv], answers: Sequence[str] | None, *, seed: int | None, name: str
) -> tuple[list[str], float]:
    """Return the answers that were given, and the sum of the rewards.

    The last of `answers` is repeated until the episode ends. Without `answers`, each answer is the
    `gold` of the last info.
    """
    given: list[str] = []
    total = 0.0
    with environment_errors(name, f"seed {seed}"):
        env = make_env()
        observation, info = env.reset(seed=seed)
        opening_prompt(observation, info, name)
        for turn in range(_MAX_TURNS):
            if answers is None and "gold" not in info:
                raise TaskError("info has no key 'gold', so the gold answer is not known")
            given.append(info["gold"] if answers is None else gold_for_turn(list(answers), turn))
            _, reward, terminated, truncated, info = check_step_result(env.step(given[-1]))
            total += reward
            if terminated or truncated:
                env.close()
                return given, total
        raise TaskError(
            f"the episode continues after {_MAX_TURNS} turns; expected an end. Return "
            "terminated or truncated as True"
        )


def check_step_result(step: tuple[Any, ...]) -> tuple[str, float, bool, bool, dict[str, Any]]:
    """Return the values of `step`: text, a finite number, two flags and info.

    Raise `TaskError` if a value has another type.
    """
    if len(step) != 5:
        raise TaskError(f"step returned {len(step)} values; expected 5")
    observation, reward, terminated, truncated, info = step
    if not isinstance(observation, str):
        raise TaskError(f"the observation is {observation!r:.60}; expected text")
    if not math.isfinite(value := float(reward)):
        raise TaskError(f"the reward is {reward!r}; expected a finite number")
    return observation, value, bool(terminated), bool(truncated), info
