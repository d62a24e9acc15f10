"""The process in which agents play: a function of the user's file is called, or the file is run."""

import asyncio
import inspect
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textpolicy.errors import ConfigError, TaskError
from textpolicy.untrusted.parsing import parse_json
from textpolicy.user_code.faults import describe_value, raise_user_errors_as
from textpolicy.user_code.killable_process import ParentLink
from textpolicy.user_code.load_file import load_python_file

PLAY_ARGUMENTS = ("prompt", "example", "base_url", "api_key", "model")
"""What the function of an agent may ask for by the names of its parameters."""
_MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class AgentFile:
    """The file of an agent, and the function that plays; without one the file is a program."""

    path: Path
    function: str | None


def check_play_function(agent: AgentFile, function: Any) -> None:
    """Raise `ConfigError` if the function cannot be called with what an agent gets."""
    where = f"{agent.path}:{agent.function}"
    if not callable(function):
        raise ConfigError(
            f"{where} is {describe_value(function)}; expected a function that plays a task"
        )
    needed = [
        name
        for name, one in inspect.signature(function).parameters.items()
        if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    ]
    if unknown := [name for name in needed if name not in PLAY_ARGUMENTS]:
        raise ConfigError(
            f"{where} asks for {', '.join(unknown)}; an agent gets any of "
            f"{', '.join(PLAY_ARGUMENTS)}, by these names"
        )


def serve_agents(parent: ParentLink) -> None:
    """Play one rollout after another, until the parent closes its end."""
    # A KeyboardInterrupt can then come only from the user's code.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(EOFError):
        play = _player(parent.receive())
        parent.send(ready=True)
        while True:
            given = parent.receive()
            try:
                score = play(given)
            except TaskError as error:
                parent.send(error=str(error))
            else:
                parent.send(score=score)


def _player(agent: AgentFile) -> Callable[[Mapping[str, Any]], float | None]:
    if agent.function is None:
        return lambda play: _run_program(agent.path, play)
    file = str(agent.path)
    module = load_python_file(agent.path, what="agent", error=TaskError)
    function = vars(module)[agent.function]

    def call(play: Mapping[str, Any]) -> float | None:
        os.environ |= _variables(play)
        with raise_user_errors_as(TaskError, f"agent {agent.function}", file=file):
            result = function(**_asked(function, play))
            if inspect.iscoroutine(result):
                result = asyncio.run(result)
        return _checked_score(result, f"agent {agent.function} returned")

    return call


def _asked(function: Callable[..., Any], play: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return dict(play)
    return {one.name: play[one.name] for one in parameters if one.name in play}


def _variables(play: Mapping[str, Any]) -> dict[str, str]:
    """Return the environment variables by which clients of OpenAI find the server."""
    return {
        "OPENAI_BASE_URL": play["base_url"],
        "OPENAI_API_KEY": play["api_key"],
        "OPENAI_MODEL": play["model"],
    }


def _run_program(path: Path, play: Mapping[str, Any]) -> float | None:
    """Run the file and return the score in its last line, or None if the line is no JSON object.

    If the program fails, this process ends as the program did, and the parent reads the reason
    from what the program has printed.
    """
    task = json.dumps({"prompt": play["prompt"], "example": play["example"]})
    process = subprocess.Popen(
        [sys.executable, "-u", str(path)],
        env=os.environ | _variables(play) | {"TEXTPOLICY_TASK": task},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    last = b""
    # Lines are read with a limit, because a program may print without end.
    while line := process.stdout.readline(_MAX_LINE_BYTES):
        last = line if line.strip() else last
    if code := process.wait():
        os.write(1, last)
        # At once: the parent kills what is left as soon as the connection closes.
        os._exit(code if code > 0 else 128 - code)
    try:
        answer = parse_json(last)
    except ValueError:
        return None
    if not isinstance(answer, dict):
        return None
    return _checked_score(answer.get("score"), "the last line of the agent's output has the score")


def _checked_score(score: Any, where: str) -> float | None:
    if score is None:
        return None
    with suppress(TypeError, ValueError):
        number = float(score)
        if math.isfinite(number):
            return number
    raise TaskError(f"{where} {describe_value(score)}; expected a finite number or None")
