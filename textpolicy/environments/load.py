"""Load an environment by name: a ready one, a user's file, a library's, or a Gymnasium id."""

import inspect
import pkgutil
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym

from textpolicy.environments.agent import load_agent, split_agent, with_limits
from textpolicy.environments.bridges.gymnasium import from_gymnasium
from textpolicy.environments.chat import ChatEnv, DrawFn
from textpolicy.environments.data_source import DataSource
from textpolicy.environments.environment import (
    BuildEnv,
    Environment,
    EpisodeTasks,
    TaskSplit,
    from_function,
    sum_turn_rewards,
)
from textpolicy.environments.module_tasks import refuse_data, tasks_of_module
from textpolicy.environments.timeout import with_timeout
from textpolicy.environments.tool_calls import parse_python_calls, parse_tagged_calls
from textpolicy.environments.tools import ToolEnv
from textpolicy.errors import ConfigError, TaskError
from textpolicy.user_code import load_beside_run, split_file_and_name

_DEFAULT_MAX_TOKENS = 256
_DEFAULT_MAX_TURNS = 8
_LIBRARIES = ("reasoning_gym", "textarena", "openenv", "verifiers", "gymnasium")
_PARSERS = {"tagged": parse_tagged_calls, "written": parse_python_calls}


def load(
    spec: str,
    data: str | Path | DataSource | None = None,
    *,
    env_timeout: float | None = None,
    tool_timeout: float | None = None,
    agent_processes: int | None = None,
) -> Environment:
    """Return the environment that `spec` names.

    `spec` is one of `ready_names()`, "FILE.py", "FILE.py:NAME" (a Gymnasium class or an
    `Environment` in the file), "agent:FILE.py" or "agent:FILE.py:FUNCTION", "reasoning_gym:TASK",
    "textarena:GAME", "openenv:URL" with the URL of a server, "verifiers:TASKSET", or
    "gymnasium:ID" with an id for `gymnasium.make`. `data` has rows, for environments that are made
    from rows: an address as of `load_rows`, or a `DataSource`.

    With `env_timeout`, episodes run in another process, and a call of reset, step or close that
    takes more seconds is killed; `tool_timeout` does the same for each call of a tool. For an agent
    `env_timeout` limits a whole rollout, and `agent_processes` is the number of rollouts at once.
    """
    environment = _load(spec, DataSource.of(data))
    if agent_processes is not None:
        environment = _with_agent_processes(environment, agent_processes)
    if tool_timeout is not None:
        environment = _with_tool_timeout(environment, tool_timeout)
    return environment if env_timeout is None else with_timeout(environment, env_timeout)


def _with_agent_processes(environment: Environment, number: int) -> Environment:
    if environment.agent is None:
        raise ConfigError(
            f"agent_processes is {number}, but environment {environment.name} is no agent. Leave "
            "agent_processes out"
        )
    return with_limits(environment, processes=number)


def _with_tool_timeout(environment: Environment, seconds: float) -> Environment:
    tasks = environment.tasks
    if isinstance(tasks, EpisodeTasks):
        build: Any = tasks.build
        if isinstance(build, partial) and build.func is ToolEnv:
            limited = partial(build, tool_timeout=seconds)
            return replace(environment, tasks=replace(tasks, build=limited))
    raise ConfigError(
        f"tool_timeout is {seconds:g}, but environment {environment.name} is no file with TOOLS. "
        "Leave tool_timeout out, or pass it to your own ToolEnv(..., tool_timeout=...)"
    )


def _load(spec: str, data: DataSource) -> Environment:
    if agent := split_agent(spec):
        return load_agent(*agent, data)
    if (file_and_name := split_file_and_name(spec)) is not None:
        return _from_file(*file_and_name, data)
    scheme, _, rest = spec.partition(":")
    if rest and scheme in _LIBRARIES:
        refuse_data(spec, data)
        return import_module(f"textpolicy.environments.bridges.{scheme}").load(rest)
    known = ready_names()
    if spec not in known:
        near = get_close_matches(spec, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise TaskError(
            f"no environment {spec!r}; known: {', '.join(known)}.{hint} Write other environments "
            f"as FILE.py, {', '.join(f'{scheme}:NAME' for scheme in _LIBRARIES)}"
        )
    return environment_from_module(import_module(f"textpolicy_envs.{spec}"), spec, data)


def ready_names() -> list[str]:
    """Return the names of the ready environments: the modules of `textpolicy_envs`."""
    folders = import_module("textpolicy_envs").__path__
    return sorted(module.name for module in pkgutil.iter_modules(folders))


def environment_from_module(
    module: ModuleType, name: str, data: str | Path | DataSource | None = None
) -> Environment:
    """Return the environment of a module with functions, or with one Gymnasium class.

    The docstring of `textpolicy_envs` describes the functions.
    """
    contents, data = vars(module), DataSource.of(data)
    if "make" not in contents and "PROMPT" not in contents:
        refuse_data(name, data)
        return _from_single_class(module, name)
    if "reward" not in contents and "turn_reward" not in contents:
        raise TaskError(f"{name} has no reward(prompt, completion, example). Write this function")
    tasks, draw = tasks_of_module(contents, name, data)
    if "TOOLS" in contents or "reply" in contents:
        return _multi_turn(contents, name, tasks, draw)
    return from_function(
        name,
        draw,
        contents["reward"],
        tasks=tasks,
        gold=contents.get("gold"),
        max_tokens=_max_tokens(contents),
    )


def _from_single_class(module: ModuleType, name: str) -> Environment:
    classes = _env_classes(module)
    if len(classes) != 1:
        raise TaskError(
            f"{name} has neither make(rng) and reward(prompt, completion, example), nor one "
            f"subclass of gymnasium.Env; its subclasses are {sorted(classes) or 'none'}"
        )
    (env,) = classes.values()
    return from_gymnasium(env, name=name, max_tokens=_max_tokens(vars(module)))


def _multi_turn(
    contents: Mapping[str, Any], name: str, tasks: TaskSplit, draw: DrawFn
) -> Environment:
    shared = {
        "turn_reward": contents.get("turn_reward"),
        "gold": contents.get("gold"),
        "max_turns": contents.get("MAX_TURNS", _DEFAULT_MAX_TURNS),
    }
    if "TOOLS" in contents:
        form = contents.get("CALLS", "tagged")
        if form not in _PARSERS:
            raise TaskError(f"{name}: CALLS is {form!r}; expected one of {list(_PARSERS)}")
        build: BuildEnv = partial(ToolEnv, tools=contents["TOOLS"], parse=_PARSERS[form], **shared)
    else:
        build = partial(ChatEnv, reply=contents["reply"], **shared)
    final = contents.get("reward")
    # With rewards of turns, only the environment knows the sum, so it also adds the final reward.
    env_adds_up = "turn_reward" in contents
    return Environment(
        name=name,
        tasks=EpisodeTasks(source=tasks, build=build, reward=final if env_adds_up else None),
        max_tokens=_max_tokens(contents),
        make_env=lambda given: build(draw, reward=final if env_adds_up else given),
        reward=sum_turn_rewards if env_adds_up else contents["reward"],
        gold=contents.get("gold"),
    )


def _from_file(path: Path, name: str, data: DataSource) -> Environment:
    module = load_beside_run(path, what="environment", error=TaskError)
    if not name:
        return environment_from_module(module, path.stem, data)
    refuse_data(f"{path}:{name}", data)
    found = vars(module).get(name)
    if isinstance(found, Environment):
        return found
    classes = _env_classes(module)
    if name not in classes:
        raise TaskError(
            f"{path} has no environment {name!r}; expected a subclass of gymnasium.Env or an "
            f"Environment. Its subclasses of gymnasium.Env are {sorted(classes) or 'none'}"
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
    return contents.get("MAX_TOKENS", _DEFAULT_MAX_TOKENS)
