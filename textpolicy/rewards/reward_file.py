"""Load rewards from the user's files: `my_reward.py:score` names a function in a file."""

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from textpolicy.errors import ConfigError, RewardError
from textpolicy.rewards.reward_function import Reward, as_reward
from textpolicy.rewards.weighted_rewards import Rewards
from textpolicy.user_code import load_python_file, split_file_and_name


def load_reward(spec: str) -> Callable[..., Any] | Rewards:
    """Return the function, or the `Rewards` of several, that "FILE.py:NAME" names.

    NAME may be left out if the file holds one function.
    """
    file_and_name = split_file_and_name(spec)
    if file_and_name is None:
        raise ConfigError(f"reward is {spec!r}; expected FILE.py or FILE.py:FUNCTION")
    path, name = file_and_name
    module = load_python_file(path, what="reward", error=RewardError)
    candidates = _rewards_in(module)
    reward: Any = vars(module).get(name) if name else _only_reward(candidates, path)
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


def _rewards_in(module: ModuleType) -> dict[str, Any]:
    """Return the functions that the file itself defines, and its `Reward` and `Rewards` records."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, Reward | Rewards)
        or (inspect.isfunction(value) and value.__module__ == module.__name__)
    }


def _only_reward(candidates: Mapping[str, Any], path: Path) -> Any:
    public = [name for name in candidates if not name.startswith("_")]
    if len(public) != 1:
        raise ConfigError(
            f"{path} holds {len(public)} functions ({', '.join(public) or 'none'}); expected one, "
            f"or its name: {path}:{public[0] if public else 'FUNCTION'}"
        )
    return candidates[public[0]]
