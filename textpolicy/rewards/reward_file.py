"""Load rewards from the user's files: `my_reward.py:score` names a function in a file."""

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from textpolicy.errors import ConfigError, RewardError
from textpolicy.rewards.reward_function import Reward, as_reward
from textpolicy.rewards.weighted_rewards import Rewards
from textpolicy.user_code import load_python_file, split_file_and_name


def load_reward(spec: str) -> Callable[..., Any] | Rewards:
    """Return the function or `Rewards` that "FILE.py:NAME" names, or a file's only function."""
    file_and_name = split_file_and_name(spec)
    if file_and_name is None:
        raise ConfigError(f"reward is {spec!r}; expected FILE.py or FILE.py:FUNCTION")
    path, name = file_and_name
    module = load_python_file(path, what="reward", error=RewardError)
    candidates = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, Reward | Rewards)
        or (inspect.isfunction(value) and value.__module__ == module.__name__)
    }
    public = [key for key in candidates if not key.startswith("_")]
    if not name and len(public) != 1:
        raise ConfigError(
            f"{path} holds {len(public)} functions ({', '.join(public) or 'none'}); expected one, "
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
