"""Environments by name: a ready one, a file of yours, a library's, or a Gymnasium id."""

import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym

from textpolicy.environments.chat import ChatEnv
from textpolicy.environments.data_files import load_rows
from textpolicy.environments.dataset import Dataset
from textpolicy.environments.environment import (
    BuildEnv,
    Environment,
    EpisodeTasks,
    GeneratedTasks,
    TaskSource,
    from_gymnasium,
    prompt_as_problem,
    question_and_answer,
    sum_turn_rewards,
)
from textpolicy.environments.single_turn import DrawFn
from textpolicy.environments.tool_calls import parse_python_calls, parse_tagged_calls
from textpolicy.environments.tools import ToolEnv
from textpolicy.errors import TaskError
from textpolicy.types import RewardFn, Task
from textpolicy.user_code import load_python_file, split_file_and_name

_DEFAULT_TOKENS = 256
_DEFAULT_TURNS = 8
# A number keeps a file named json.py from passing for another module.
_PARSERS = {"tagged": parse_tagged_calls, "written": parse_python_calls}


def load(spec: str, data: str | Path | None = None) -> Environment:
    """The environment that `spec` names.

    "sort" is one of `ready_names()`, "mine.py" a file that holds one, "mine.py:Game" a class of
    it, "reasoning_gym:TASK" and "textarena:GAME" are of these libraries, "gymnasium:ID" is what
    `gymnasium.make` knows. Environments that are made from rows take theirs from `data`.
    """
    if (file_and_name := split_file_and_name(spec)) is not None:
        return _from_file(*file_and_name, data)
    scheme, _, rest = spec.partition(":")
    if rest and scheme in _BRIDGES:
        _refuse_data(spec, data)
        return _BRIDGES[scheme](rest)
    known = ready_names()
    if spec not in known:
        near = get_close_matches(spec, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise TaskError(
            f"no environment {spec!r}; known: {', '.join(known)}.{hint} Others are written as "
            f"FILE.py, {', '.join(f'{scheme}:NAME' for scheme in _BRIDGES)}"
        )
    return environment_from_module(import_module(f"textpolicy_envs.{spec}"), spec, data)


def ready_names() -> list[str]:
    """The ready environments, the modules of `textpolicy_envs`."""
    folders = import_module("textpolicy_envs").__path__
    return sorted(module.name for module in pkgutil.iter_modules(folders))


def environment_from_module(
    module: ModuleType, name: str, data: str | Path | None = None
) -> Environment:
    """What a module holds, as `textpolicy_envs` describes: functions, or one Gymnasium class."""
    contents = vars(module)
    if "make" not in contents and "PROMPT" not in contents:
        _refuse_data(name, data)
        return _from_class(module, name)
    if "reward" not in contents and "turn_reward" not in contents:
        raise TaskError(f"{name} has no reward(prompt, completion, example)")
    source, draw = _source(contents, name, data)
    if "TOOLS" in contents or "reply" in contents:
        return _episodes(contents, name, source, draw)
    return question_and_answer(
        name,
        draw,
        contents["reward"],
        tasks=source,
        gold=contents.get("gold"),
        max_tokens=_max_tokens(contents),
    )


def _from_class(module: ModuleType, name: str) -> Environment:
    classes = _env_classes(module)
    if len(classes) != 1:
        raise TaskError(
            f"{name} holds neither make(rng) and reward(prompt, completion, example), nor one "
            f"subclass of gymnasium.Env; its classes: {sorted(classes) or 'none'}"
        )
    (env,) = classes.values()
    return from_gymnasium(env, name=name, max_tokens=_max_tokens(vars(module)))


def _source(
    contents: Mapping[str, Any], name: str, data: str | Path | None
) -> tuple[TaskSource, DrawFn]:
    if "PROMPT" in contents:
        rows = load_rows(data) if data else contents.get("ROWS")
        if rows is None:
            raise TaskError(f"{name} has no rows of its own: name a file of them, --data FILE")
        dataset = Dataset.from_rows(rows, contents["PROMPT"], name=name)
        return dataset, dataset.draw
    _refuse_data(name, data)
    problem = _Problem(contents["problem"]) if "problem" in contents else prompt_as_problem
    return GeneratedTasks(name=name, draw=contents["make"], problem=problem), contents["make"]


def _refuse_data(name: str, data: str | Path | None) -> None:
    if data is not None:
        raise TaskError(
            f"environment {name} makes its tasks itself and takes no rows; got {str(data)!r}. "
            "Leave out the one or the other"
        )


def _episodes(
    contents: Mapping[str, Any], name: str, source: TaskSource, draw: DrawFn
) -> Environment:
    build, final = _build(contents, name), contents.get("reward")
    # Where turns earn too, only the environment can add everything up.
    adds_up = "turn_reward" in contents
    reward: RewardFn = sum_turn_rewards if adds_up else contents["reward"]
    return Environment(
        name=name,
        tasks=EpisodeTasks(source=source, build=build, reward=final if adds_up else None),
        max_tokens=_max_tokens(contents),
        make_env=lambda given: build(draw, reward=final if adds_up else given),
        reward=reward,
        gold=contents.get("gold"),
    )


def _build(contents: Mapping[str, Any], name: str) -> BuildEnv:
    shared = {
        "turn_reward": contents.get("turn_reward"),
        "gold": contents.get("gold"),
        "max_turns": contents.get("MAX_TURNS", _DEFAULT_TURNS),
    }
    if "TOOLS" not in contents:
        return partial(ChatEnv, reply=contents["reply"], **shared)
    form = contents.get("CALLS", "tagged")
    if form not in _PARSERS:
        raise TaskError(f"{name}: CALLS is {form!r}; expected one of {list(_PARSERS)}")
    return partial(ToolEnv, tools=contents["TOOLS"], parse=_PARSERS[form], **shared)


@dataclass(frozen=True, slots=True)
class _Problem:
    """Asks the module which problem a task poses, where its prompt does not tell."""

    problem: Callable[[Mapping[str, Any]], str]

    def __call__(self, task: Task) -> str:
        return self.problem(task.example)


def _from_file(path: Path, name: str, data: str | Path | None) -> Environment:
    module = load_python_file(path, what="environment", error=TaskError)
    if not name:
        return environment_from_module(module, path.stem, data)
    _refuse_data(f"{path}:{name}", data)
    found = vars(module).get(name)
    if isinstance(found, Environment):
        return found
    classes = _env_classes(module)
    if name not in classes:
        raise TaskError(
            f"{path} has no environment {name!r}; expected a subclass of gymnasium.Env or an "
            f"Environment. Its classes: {sorted(classes) or 'none'}"
        )
    return from_gymnasium(classes[name], name=name, max_tokens=_max_tokens(vars(module)))


def _env_classes(module: ModuleType) -> dict[str, type[gym.Env[Any, Any]]]:
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, gym.Env)
        and value.__module__ == module.__name__
    }


def _max_tokens(contents: Mapping[str, Any]) -> int:
    return contents.get("MAX_TOKENS", _DEFAULT_TOKENS)


def _from_bridge(bridge: str, name: str) -> Environment:
    return import_module(f"textpolicy.environments.bridges.{bridge}").load(name)


_BRIDGES: Mapping[str, Callable[[str], Environment]] = {
    "reasoning_gym": partial(_from_bridge, "reasoning_gym"),
    "textarena": partial(_from_bridge, "textarena"),
    "gymnasium": from_gymnasium,
}
