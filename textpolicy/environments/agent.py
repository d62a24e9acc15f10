"""Agents as environments: a function or a program asks the policy through a server, and scores.

A file with the function `play` is an agent: the function is called for each rollout, and returns
the score. A file without it is a program: it is run for each rollout, and prints the score.
docs/agents.md has the contract.
"""

import ast
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from textpolicy.environments.agent_processes import AgentProcesses
from textpolicy.environments.data_source import DataSource
from textpolicy.environments.environment import (
    AgentTasks,
    Environment,
    TaskSplit,
    sum_turn_rewards,
)
from textpolicy.environments.module_tasks import tasks_of_module
from textpolicy.errors import TaskError
from textpolicy.user_code import load_beside_run, split_file_and_name
from textpolicy.user_code.agent_worker import AgentFile, check_play_function

AGENT_SCHEME = "agent:"
_PLAY = "play"
_DEFAULT_MAX_TOKENS = 256
_DEFAULT_MAX_TURNS = 64


def split_agent(spec: str) -> tuple[Path, str] | None:
    """Return the path and the name of "agent:FILE.py:NAME", or None if `spec` names no agent."""
    if not spec.startswith(AGENT_SCHEME):
        return None
    file_and_name = split_file_and_name(spec.removeprefix(AGENT_SCHEME))
    if file_and_name is None:
        raise TaskError(
            f"{spec!r} names no Python file. Write agents as agent:FILE.py or "
            "agent:FILE.py:FUNCTION; a program of another kind can be started from such a file"
        )
    return file_and_name


def load_agent(path: Path, name: str, data: DataSource) -> Environment:
    """Return the environment of an agent: its tasks, and the score or the reward of the file."""
    if not path.is_file():
        raise TaskError(f"agent file {str(path)!r} does not exist (looked in {Path.cwd()})")
    function = name or (_PLAY if _PLAY in _functions_of(path) else None)
    agent = AgentFile(path=path.absolute(), function=function)
    contents: Mapping[str, Any] = {}
    if function is not None:
        contents = vars(load_beside_run(path, what="agent", error=TaskError))
        if function not in contents:
            raise TaskError(f"{path} has no function {function!r} that plays a task")
        check_play_function(agent, contents[function])
    processes = AgentProcesses(agent, max_turns=contents.get("MAX_TURNS", _DEFAULT_MAX_TURNS))
    return Environment(
        name=path.stem,
        tasks=AgentTasks(source=_tasks(contents, path, data), agent=processes),
        max_tokens=contents.get("MAX_TOKENS", _DEFAULT_MAX_TOKENS),
        make_env=lambda reward: _refuse_episodes(path),
        reward=contents.get("reward", sum_turn_rewards),
    )


def with_limits(
    environment: Environment, *, seconds: float | None = None, processes: int | None = None
) -> Environment:
    """Return the environment of an agent with other limits; None keeps the limit."""
    tasks = environment.tasks
    assert isinstance(tasks, AgentTasks)
    assert isinstance(tasks.agent, AgentProcesses)
    agent = AgentProcesses(
        tasks.agent.agent,
        max_turns=tasks.agent.max_turns,
        processes=processes or tasks.agent.processes,
        seconds=seconds or tasks.agent.seconds,
    )
    return replace(environment, tasks=replace(tasks, agent=agent))


def _functions_of(path: Path) -> set[str]:
    """Return the names of a file's functions. The file is not run: it may be a program."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError) as error:
        raise TaskError(f"agent file {path} cannot be read: {error}") from error
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in tree.body if isinstance(node, kinds)}


def _tasks(contents: Mapping[str, Any], path: Path, data: DataSource) -> TaskSplit:
    if "make" in contents or "PROMPT" in contents:
        return tasks_of_module(contents, path.stem, data)[0]
    if data.is_empty:
        raise TaskError(
            f"agent {path} has no tasks. Name a file of rows with a column 'prompt', --data FILE, "
            "or write make(rng) beside play"
        )
    return data.tasks(name=path.stem)


def _refuse_episodes(path: Path) -> NoReturn:
    raise TaskError(
        f"agent {path} plays its tasks itself, so there is no Gymnasium environment of them"
    )
