"""check_env: tests an environment against the contract of docs/environments.md."""

import warnings
from collections.abc import Callable, Sequence
from itertools import islice

from gymnasium.utils.env_checker import check_env as gymnasium_check_env

from textpolicy.environments.chat import gold_for_turn, prompt_text
from textpolicy.environments.environment import Environment
from textpolicy.environments.faults import environment_errors
from textpolicy.environments.play import play_episode
from textpolicy.errors import TaskError
from textpolicy.rewards import sample_of, scorer_of
from textpolicy.types import Task

# Models write such answers sooner or later.
_HOSTILE_ANSWERS = (
    "",
    " \n\t",
    "\x00\x1b[31m",
    "漢字🙂\u2028\u202e",
    "{0.__class__} {{x}} %s",
    "<tool_call>{",
    "[" * 5000,
    "9" * 5000,
)
# Some verifiers give a small reward to any answer.
_MAX_EMPTY_REWARD = 0.1


def check_env(environment: Environment, number: int = 200) -> None:
    """Raise `TaskError` with the first part of the contract that the environment breaks.

    The checks are Gymnasium's own checker, equal tasks for equal seeds, hostile answers, and an
    end to each episode. If the environment has gold answers, they must earn more than empty
    answers on `number` training tasks and `number` held-out tasks. An agent is not played: only
    its tasks are checked.
    """
    # The error about a first task without text is clearer than those of Gymnasium's checker.
    next(environment.stream(0))
    if environment.agent is not None:
        _check_tasks(environment, min(number, 20))
        return
    with environment_errors(environment.name, "gymnasium.make"):
        env = environment.make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Gymnasium warns of unknown spaces, of environments not made by gymnasium.make, and of the
        # wrappers that gymnasium.make adds.
        warnings.filterwarnings(
            "ignore", message=".*(?:alternative render modes|spec|from the unwrapped version).*"
        )
        with environment_errors(environment.name, "gymnasium's check_env"):
            gymnasium_check_env(env, skip_render_check=True, skip_close_check=True)
    _check_tasks(environment, min(number, 20) if environment.gold is None else number)
    for answer in _HOSTILE_ANSWERS:
        play_episode(environment.make, [answer], seed=0, name=environment.name)
    for seed in range(3):
        _, info = environment.make().reset(seed=seed)
        if "gold" in info:
            _check_gold_episode(environment, seed)


def _check_tasks(environment: Environment, number: int) -> None:
    tasks, again = (list(islice(environment.stream(0), number)) for _ in range(2))
    for first, second in zip(tasks, again, strict=True):
        if (first.prompt, first.example) != (second.prompt, second.example):
            raise TaskError(
                f"environment {environment.name}: the same seed gave the prompt "
                f"{first.prompt!r:.60}, then {second.prompt!r:.60}; expected equal tasks"
            )
    single = [task for task in tasks + environment.heldout(number) if task.env is None]
    if environment.gold is not None and single:
        gold = [(task, gold_for_turn(environment.gold(task.example), 0)) for task in single]
        expected = "1.0, because the completion is the gold answer"
        _check_rewards(environment, gold, lambda value: value == 1.0, expected)
        empty = [(task, "") for task in single]
        expected = f"at most {_MAX_EMPTY_REWARD}, because the completion is empty"
        _check_rewards(environment, empty, lambda value: value <= _MAX_EMPTY_REWARD, expected)


def _check_rewards(
    environment: Environment,
    answers: Sequence[tuple[Task, str]],
    is_allowed: Callable[[float], bool],
    expected: str,
) -> None:
    samples = [sample_of(prompt_text(task.prompt), text, task.example) for task, text in answers]
    with scorer_of(environment.reward) as scorer:
        verdicts = scorer.score(samples)
    for sample, verdict in zip(samples, verdicts, strict=True):
        if verdict.value is None or not is_allowed(verdict.value):
            raise TaskError(
                f"environment {environment.name}, prompt {sample.prompt!r}: the completion "
                f"{sample.completion!r} has the reward {verdict.value}; expected {expected}"
            )


def _check_gold_episode(environment: Environment, seed: int) -> None:
    _, right = play_episode(environment.make, None, seed=seed, name=environment.name)
    _, empty = play_episode(environment.make, [""], seed=seed, name=environment.name)
    if not right > empty:
        raise TaskError(
            f"environment {environment.name}, seed {seed}: the gold answers earn {right} and empty "
            f"answers earn {empty}; expected the gold answers to earn more"
        )
