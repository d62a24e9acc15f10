"""Play episodes with fixed answers or with the environment's own gold answers."""

from collections.abc import Callable, Sequence

from textpolicy.environments.chat import gold_for_turn
from textpolicy.environments.environment import Environment
from textpolicy.environments.episode_values import check_step_result, gold_in, open_episode
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
        _, info = open_episode(env, seed)
        for turn in range(_MAX_TURNS):
            given.append(gold_in(info) if answers is None else gold_for_turn([*answers], turn))
            step = check_step_result(env.step(given[-1]))
            total, info = total + step.reward, step.info
            if step.terminated or step.truncated:
                env.close()
                return given, total
        raise TaskError(
            f"the episode continues after {_MAX_TURNS} turns; expected an end. Return "
            "terminated or truncated as True"
        )
