"""What every environment must keep, tried out: `check_env` names the first thing that breaks."""

import math
import warnings
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from gymnasium.utils.env_checker import check_env as gymnasium_check_env

from textpolicy.environments.environment import Environment, opening_prompt
from textpolicy.environments.faults import environment_errors
from textpolicy.environments.single_turn import gold_for_turn, prompt_text
from textpolicy.errors import TaskError
from textpolicy.rewards import sample_of, scorer_of
from textpolicy.types import Task, TextEnv

# What models write sooner or later.
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
_MAX_TURNS = 200
# Some verifiers give a little to any answer at all.
_SILENCE = 0.1
_AT_MOST = f"at most {_SILENCE}, because it is no answer"


def check_env(environment: Environment, number: int = 200) -> None:
    """Raise `TaskError` naming what breaks the contract of an environment, and where.

    Tried are Gymnasium's own checker, repetition by seed, hostile answers, that the episode ends,
    and on `number` tasks that the gold answers, where there are any, earn more than silence.
    """
    _check_as_gymnasium(environment)
    _check_tasks(environment, min(number, 20) if environment.gold is None else number)
    for answer in _HOSTILE_ANSWERS:
        play_episode(environment.make(), [answer], seed=0, name=environment.name)
    for seed in range(3):
        _check_gold(environment, seed)


def play_episode(
    env: TextEnv, answers: Sequence[str] | None, *, seed: int, name: str
) -> tuple[float, int]:
    """The rewards of one episode, added up, and its turns. After the last answer, the last again.

    Without `answers`, each turn's is the `gold` of the info before it.
    """
    total = 0.0
    with environment_errors(name, f"seed {seed}"):
        observation, info = env.reset(seed=seed)
        opening_prompt(observation, info, name)
        for turn in range(_MAX_TURNS):
            answer = info["gold"] if answers is None else gold_for_turn(list(answers), turn)
            step = env.step(answer)
            observation, reward, terminated, truncated, info = check_step_result(step)
            total += reward
            if terminated or truncated:
                env.close()
                return total, turn + 1
    raise TaskError(f"environment {name} goes on after {_MAX_TURNS} turns; expected it to end")


def check_step_result(step: tuple[Any, ...]) -> tuple[str, float, bool, bool, dict[str, Any]]:
    """What `step` returned, if it is as Gymnasium says: text, a finite number, two flags, info."""
    if len(step) != 5:
        raise TaskError(f"step returned {len(step)} values; expected 5")
    observation, reward, terminated, truncated, info = step
    if not isinstance(observation, str):
        raise TaskError(f"the observation is {observation!r:.60}; expected text")
    if not math.isfinite(value := float(reward)):
        raise TaskError(f"the reward is {reward!r}; expected a finite number")
    return observation, value, bool(terminated), bool(truncated), info


def _check_as_gymnasium(environment: Environment) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # It warns of spaces it does not know, and of environments made without gymnasium.make.
        warnings.filterwarnings("ignore", message=".*(?:alternative render modes|spec).*")
        with environment_errors(environment.name, "gymnasium's check_env"):
            gymnasium_check_env(environment.make(), skip_render_check=True, skip_close_check=True)


def _check_tasks(environment: Environment, number: int) -> None:
    tasks, again = (list(islice(environment.stream(0), number)) for _ in range(2))
    for first, second in zip(tasks, again, strict=True):
        if (first.prompt, first.example) != (second.prompt, second.example):
            raise TaskError(
                f"{environment.name}: the same seed gave {first.prompt!r:.60}, then "
                f"{second.prompt!r:.60}"
            )
    answered = [task for task in tasks + environment.heldout(number) if task.env is None]
    if environment.gold is not None and answered:
        gold = [gold_for_turn(environment.gold(task.example), 0) for task in answered]
        _check_scores(
            environment,
            answered,
            gold,
            lambda value: value == 1.0,
            "1.0, because it is the gold answer",
        )
        silence = [""] * len(answered)
        _check_scores(environment, answered, silence, lambda value: value <= _SILENCE, _AT_MOST)


def _check_scores(
    environment: Environment,
    tasks: Sequence[Task],
    answers: Sequence[str],
    holds: Callable[[float], bool],
    expected: str,
) -> None:
    asked = zip(tasks, answers, strict=True)
    samples = [sample_of(prompt_text(task.prompt), answer, task.example) for task, answer in asked]
    with scorer_of(environment.reward) as scorer:
        verdicts = scorer.score(samples)
    for sample, verdict in zip(samples, verdicts, strict=True):
        if verdict.value is None or not holds(verdict.value):
            raise TaskError(
                f"{environment.name}: {sample.prompt!r} scores {verdict.value} for "
                f"{sample.completion!r}; expected {expected}"
            )


def _check_gold(environment: Environment, seed: int) -> None:
    _, info = environment.make().reset(seed=seed)
    if "gold" not in info:
        return
    right, _ = play_episode(environment.make(), None, seed=seed, name=environment.name)
    silent, _ = play_episode(environment.make(), [""], seed=seed, name=environment.name)
    if not right > silent:
        raise TaskError(
            f"environment {environment.name}, seed {seed}: the gold answers earn {right}, empty "
            f"ones {silent}; expected the gold answers to earn more"
        )
