"""Rewards from files: `my_reward.py:score` names a function without importing a package."""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from difflib import get_close_matches
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

from textpolicy.errors import ConfigError
from textpolicy.rewards.faults import user_code
from textpolicy.types import RewardFn

_numbers = count(1)


def load_reward(spec: str) -> RewardFn:
    """The function that "FILE.py:FUNCTION" names."""
    file, _, name = spec.rpartition(":")
    if not file or not name:
        raise ConfigError(f"reward is {spec!r}; expected FILE.py:FUNCTION, such as mine.py:score")
    module = run_file(Path(file), what="reward")
    functions = [
        key
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    ]
    reward: Any = vars(module).get(name)
    if reward is None:
        near = get_close_matches(name, functions, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{file} has no {name!r}; its functions: {functions or 'none'}.{hint}")
    if not isinstance(reward, RewardFn):
        raise ConfigError(f"{spec} is {type(reward).__name__}; expected a function")
    _check_signature(reward, spec)
    return reward


def run_file(path: Path, *, what: str) -> ModuleType:
    """The module that a Python file makes when it is run; `what` is what messages call it."""
    if not path.is_file():
        raise ConfigError(f"{what} file {str(path)!r} does not exist (looked in {Path.cwd()})")
    # A number keeps a file named json.py from passing for another module.
    name = f"{what}_file_{next(_numbers)}_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"{what} file {path} is not a Python file: expected a name ending in .py")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    _find_neighbours(path.resolve().parent)
    with user_code(f"importing {path}", file=str(path)):
        module_spec.loader.exec_module(module)
    return module


def _find_neighbours(folder: Path) -> None:
    """Let the file import those beside it as `python FILE.py` would, its functions too, later."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _check_signature(reward: Callable[..., Any], spec: str) -> None:
    signature = inspect.signature(reward)
    try:
        signature.bind("prompt", "completion", {})
    except TypeError as error:
        raise ConfigError(
            f"{spec} takes {signature}; expected (prompt, completion, example): {error}"
        ) from error
