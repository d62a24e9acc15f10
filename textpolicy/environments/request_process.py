"""A process for environments and tools: it answers one request at a time, and a late one kills it.

`RequestProcess` is the parent's end, and `serve` is the program of the process. A killed process is
started afresh for the next request. The parent reads only JSON, and believes nothing of it.
"""

import json
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from threading import Lock, RLock
from typing import Any

from textpolicy.environments.episode_values import check_step_result, open_episode
from textpolicy.environments.faults import call_tool, outcome_of
from textpolicy.errors import ConfigError, TaskError
from textpolicy.types import TextEnv
from textpolicy.untrusted.parsing import parse_json
from textpolicy.user_code import files_named_in, load_python_file, raise_user_errors_as
from textpolicy.user_code.killable_process import ForgedAnswerError, KillableProcess, ParentLink

_STARTUP_SECONDS = 60.0
"""How long the process may take to import the user's files."""
_MAX_MESSAGE_BYTES = 16 << 20
_MAX_EXCERPT = 80


class RequestProcess:
    """The parent's end. Each request may take `seconds`.

    `generation` counts the processes that were killed: what they knew is lost. Requests of several
    threads take turns: whoever holds `lock` is alone with the process. The time of a request starts
    when it is its turn.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.generation = 0
        self.lock = RLock()
        self._child: KillableProcess | None = None
        self._files: set[str] = set()
        self._requests = 0

    def load(self, packed: bytes) -> None:
        """Start the process if there is none, and let it import what `pack` has packed."""
        files = {
            name: file for name, file in files_named_in(packed).items() if name not in self._files
        }
        if self._child is None or files:
            self.request("the start of its process", "load", files, packed, late=_STARTUP_SECONDS)
            self._files |= files.keys()

    def request(self, what: str, *content: Any, late: float | None = None) -> Any:
        """Return the answer. Raise `TaskError` if there is none in time, or if it is an error.

        `what` is the word for the request in messages.
        """
        if self._child is None:
            entry = f"{__name__}:{serve.__name__}"
            self._child = KillableProcess(entry, max_message_bytes=_MAX_MESSAGE_BYTES)
        self._requests += 1
        self._child.send((self._requests, *content))
        match message := self._wait(self._child, what, late or self.seconds):
            case {"request": self._requests, "answer": answer}:
                return answer
            case {"request": self._requests, "error": str(error)}:
                raise TaskError(error)
            case _:
                self._end()
                raise _forged(what, repr(message)[:_MAX_EXCERPT])

    def _wait(self, child: KillableProcess, what: str, seconds: float) -> Mapping[str, Any]:
        """Return the next message of the process; end the process if none comes in time."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                if message := next(child.read_messages(), None):
                    return message
            except ForgedAnswerError as error:
                self._end()
                raise _forged(what, str(error)) from error
            except EOFError as error:
                ending = child.kill_and_describe()
                self._end()
                raise TaskError(f"{what} ended its process, which {ending}") from error
            left = deadline - time.monotonic()
            if left <= 0:
                self._end()
                raise TaskError(
                    f"{what} took longer than {seconds:g} s and was stopped, with all that it had "
                    "started"
                )
            wait([child.socket, *([child.output] if child.output_is_open else [])], left)

    def _end(self) -> None:
        if self._child:
            self._child.kill()
        self._child, self._files = None, set()
        self.generation += 1


def _forged(what: str, shown: str) -> TaskError:
    return TaskError(f"{what}: its process wrote {shown} where an answer was expected")


def pack(content: Callable[..., Any], what: str) -> bytes:
    """Return the classes and functions by their names; raise if they have no names to import."""
    with raise_user_errors_as(
        ConfigError,
        f"{what} cannot run with a timeout: a timeout needs another process, and that process has "
        "to find the functions and classes by their names. Move them to the top level of a file. "
        "Handing them over",
    ):
        packed = bytes(ForkingPickler.dumps(content))
    if b"__main__" in packed:
        raise ConfigError(
            f"{what} cannot run with a timeout, because its functions or classes are in the script "
            "that starts the run. Move them to a file of their own, and import this file"
        )
    return packed


def call_tool_in_process(
    seconds: float, tool: Callable[..., Any], arguments: Mapping[str, Any]
) -> tuple[str, bool]:
    """Call a tool as `call_tool` does, in another process that is killed if this takes longer."""
    process, packed, name = tool_process(seconds), pack(tool, "a tool"), tool.__name__
    try:
        with process.lock:
            process.load(packed)
            answer = process.request(f"tool {name}", "tool", packed, dict(arguments))
    except TaskError as error:
        return f"error: {error}", False
    match answer:
        case [str(text), bool(returned)]:
            return text, returned
        case _:
            return f"error: {_forged(f'tool {name}', repr(answer)[:_MAX_EXCERPT])}", False


_tool_processes: dict[float, RequestProcess] = {}
_tool_processes_lock = Lock()


def tool_process(seconds: float) -> RequestProcess:
    """Return the process in which all tools with this time limit run, in all threads."""
    with _tool_processes_lock:
        return _tool_processes.setdefault(seconds, RequestProcess(seconds))


def serve(parent: ParentLink) -> None:
    """Answer requests until the parent closes its end."""
    # A KeyboardInterrupt can then come only from the user's code.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = _Server(parent)
    with suppress(EOFError):
        while True:
            number, operation, *arguments = parent.receive()
            answer, error = outcome_of(partial(server.answer, operation, *arguments))
            parent.send(
                request=number, **({"answer": answer} if error is None else {"error": error})
            )


class _Server:
    """The environments of a process by their numbers, and what can be done with them."""

    def __init__(self, parent: ParentLink) -> None:
        self._parent = parent
        self._envs: dict[int, TextEnv] = {}

    def answer(self, operation: str, *arguments: Any) -> Any:
        operations: dict[str, Callable[..., Any]] = {
            "load": self._load,
            "reset": self._reset,
            "step": self._step,
            "close": self._close,
            "tool": self._call_tool,
        }
        return operations[operation](*arguments)

    def _load(self, files: Mapping[str, str], packed: bytes) -> None:
        for name, file in files.items():
            load_python_file(Path(file), what="environment", error=TaskError, module_name=name)
        self._parent.unpickle(packed)

    def _reset(self, number: int, packed: bytes, seed: int | None, keys: tuple[str, ...]) -> Any:
        env = self._envs[number] = self._parent.unpickle(packed)()
        prompt, info = open_episode(env, seed)
        return [prompt, _as_json({key: info[key] for key in keys if key in info})]

    def _step(self, number: int, action: str) -> Any:
        step = check_step_result(self._envs[number].step(action))
        info = _as_json({"messages": list(step.messages), "metrics": dict(step.metrics)})
        return [step.reward, step.terminated, step.truncated, info]

    def _close(self, number: int) -> None:
        if (env := self._envs.pop(number, None)) is not None:
            env.close()

    def _call_tool(self, packed: bytes, arguments: Mapping[str, Any]) -> Any:
        return call_tool(self._parent.unpickle(packed), arguments)


def _as_json(info: dict[str, Any]) -> dict[str, Any]:
    """Return the values, or raise `TaskError` if they would come back from JSON as others."""
    try:
        exact = parse_json(json.dumps(info)) == info
    except (TypeError, ValueError):
        exact = False
    if not exact:
        raise TaskError(
            f"info holds {' or '.join(info)} that JSON cannot hold. With a timeout, they must be "
            "texts, numbers, lists, and mappings with texts as keys"
        )
    return info
