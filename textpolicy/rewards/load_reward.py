"""Load the reward that an option names: a function of the user's file, or a ready reward."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from textpolicy.errors import ConfigError, RewardError
from textpolicy.rewards.reward_function import Reward, as_reward
from textpolicy.rewards.verifiers.mathematics.answers import math_equal, number_equal
from textpolicy.rewards.verifiers.text_answers import (
    choice_match,
    exact_match,
    normalised_match,
    set_match,
    set_overlap,
)
from textpolicy.rewards.weighted_rewards import Rewards
from textpolicy.user_code import load_beside_run, split_file_and_name


@dataclass(frozen=True)
class _WithAnswer:
    """Compares what the model answered, without its thought, with the column `answer`."""

    verifier: Callable[[str, Any], float]

    def __call__(self, completion: str, visible_answer: str, answer: Any) -> float:
        # Because of `completion`, rows without a column `answer` are refused: `answer` would
        # otherwise be another name of `visible_answer`.
        return float(self.verifier(visible_answer, answer))


_VERIFIERS: tuple[Callable[[str, Any], float], ...] = (
    *(exact_match, normalised_match, number_equal, math_equal),
    *(choice_match, set_match, set_overlap),
)
READY_REWARDS = {one.__name__: Reward(_WithAnswer(one), one.__name__) for one in _VERIFIERS}
"""Rewards that need no file: verifiers that compare the answer with the column `answer`."""


def load_reward(spec: str) -> Callable[..., Any] | Rewards:
    """Return the function or `Rewards` that "FILE.py:NAME" names.

    Without NAME, this is the only `Rewards` of the file, else its only function. A name of
    `READY_REWARDS` alone is that reward.
    """
    if spec in READY_REWARDS:
        return READY_REWARDS[spec]
    file_and_name = split_file_and_name(spec)
    if file_and_name is None:
        raise ConfigError(
            f"reward is {spec!r}; expected FILE.py, FILE.py:FUNCTION, or a ready reward: "
            f"{', '.join(READY_REWARDS)}"
        )
    path, name = file_and_name
    module = load_beside_run(path, what="reward", error=RewardError)
    candidates = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, Reward | Rewards)
        or (inspect.isfunction(value) and value.__module__ == module.__name__)
    }
    public = [key for key in candidates if not key.startswith("_")]
    combined = [key for key in public if isinstance(candidates[key], Rewards)]
    # The other functions of the file are what the combination combines.
    public = combined or public
    if not name and len(public) != 1:
        raise ConfigError(
            f"{path} holds {len(public)} {'combinations' if combined else 'functions'} "
            f"({', '.join(public) or 'none'}); expected one, "
            f"or its name: {path}:{public[0] if public else 'FUNCTION'}"
        )
    reward: Any = vars(module).get(name or public[0])
    if reward is None:
        near = get_close_matches(name, candidates, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"{path} has no {name!r}; its functions: {[*candidates] or 'none'}.{hint}"
        )
    if isinstance(reward, Rewards):
        return reward
    if not callable(reward):
        raise ConfigError(f"{spec} is {type(reward).__name__}; expected a function")
    _ = as_reward(reward).parameters  # Raises for a function that would not see the completion.
    return reward
