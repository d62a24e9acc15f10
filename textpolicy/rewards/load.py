"""Rewards from files: `my_reward.py:score` names a function without importing a package."""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

from textpolicy.errors import ConfigError
from textpolicy.rewards.composition import Rewards
from textpolicy.rewards.contract import Reward, as_reward
from textpolicy.rewards.faults import user_code
from textpolicy.rewards.signature import read_signature

PREFIX = "textpolicy_file_"
"""How the names of modules begin that were run from a file, and that no import would find."""
MAIN = "__mp_main__"
"""What a script is called in the processes that run it for its functions, as multiprocessing does;
its `if __name__ == "__main__"` part is then left out."""
_numbers = count(1)


def load_reward(spec: str) -> Callable[..., Any] | Rewards:
    """What "FILE.py:NAME" names: a function, or a `Rewards` of several.

    NAME may be left out where the file holds one function.
    """
    file, _, name = spec.rpartition(":") if not spec.endswith(".py") else (spec, "", "")
    path = Path(file or spec)
    if path.suffix != ".py":
        raise ConfigError(f"reward is {spec!r}; expected FILE.py or FILE.py:FUNCTION")
    module = run_file(path, what="reward")
    found = _rewards_in(module)
    reward: Any = vars(module).get(name) if name else _only(found, path)
    if reward is None:
        near = get_close_matches(name, found, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{path} has no {name!r}; its functions: {[*found] or 'none'}.{hint}")
    if isinstance(reward, Rewards):
        return reward
    if not callable(reward):
        raise ConfigError(f"{spec} is {type(reward).__name__}; expected a function")
    read_signature(as_reward(reward))
    return reward


def run_file(path: Path, *, what: str, name: str | None = None) -> ModuleType:
    """The module that a Python file makes when it is run; `what` is what messages call it.

    It can import the files beside it, as under `python FILE.py`.
    """
    if not path.is_file():
        raise ConfigError(f"{what} file {str(path)!r} does not exist (looked in {Path.cwd()})")
    # A number keeps a file named json.py from passing for another module.
    name = name or f"{PREFIX}{next(_numbers)}_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"{what} file {path} is not a Python file: expected a name ending in .py")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    with user_code(f"importing {path}", file=str(path)):
        module_spec.loader.exec_module(module)
    return module


def _rewards_in(module: ModuleType) -> dict[str, Any]:
    """The functions that the file itself defines, and what it made of them."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, Reward | Rewards)
        or (inspect.isfunction(value) and value.__module__ == module.__name__)
    }


def _only(found: Mapping[str, Any], path: Path) -> Any:
    public = [name for name in found if not name.startswith("_")]
    if len(public) != 1:
        raise ConfigError(
            f"{path} holds {len(public)} functions ({', '.join(public) or 'none'}); expected one, "
            f"or its name: {path}:{public[0] if public else 'FUNCTION'}"
        )
    return found[public[0]]
