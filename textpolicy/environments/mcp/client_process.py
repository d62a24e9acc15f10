"""The parent's end of the process in which the MCP client runs with all its sessions.

Several threads may ask at the same time. One of the waiting threads reads the answers for all. The
guard of the process kills every server with it, also if this process is killed.
"""

import shlex
from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from multiprocessing.connection import wait
from threading import Condition
from typing import Any

from textpolicy.errors import ConfigError, TaskError
from textpolicy.user_code.killable_process import ForgedAnswerError, KillableProcess

_ENTRY = "textpolicy.environments.mcp.sessions:serve_sessions"
_SILENT_SECONDS = 60.0
"""After this time without a sign of life, which comes each second, the process is stuck."""
_MAX_MESSAGE_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class McpServer:
    """How to reach an MCP server: by its URL, or as a process that `command` starts."""

    url: str
    command: tuple[str, ...]
    folder: str
    env: tuple[tuple[str, str], ...]
    headers: tuple[tuple[str, str], ...]
    is_shared: bool
    """Whether all episodes have one session."""
    timeout: float
    start_timeout: float

    @property
    def shown(self) -> str:
        return f"the MCP server {self.url or shlex.join(self.command)!r}"


class _ClientProcess:
    """The process, started at the first request, and again after it was killed."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._child: KillableProcess | None = None
        self._is_read = False
        self._numbers = 0
        self._waiting: set[int] = set()
        self._answers: dict[int, tuple[Any, str | None]] = {}
        self.dropped: deque[int] = deque()

    def request(self, *content: Any) -> Any:
        """Return the answer to a request; raise `TaskError` if the answer is an error."""
        with self._changed:
            child = self._started()
            while self.dropped:
                child.send((None, "close", self.dropped.popleft()))
            self._numbers += 1
            number = self._numbers
            self._waiting.add(number)
            child.send((number, *content))
        answer, error = self._receive(number, child)
        if error is not None:
            raise TaskError(error)
        return answer

    def close(self, episode: int) -> None:
        """End the sessions of an episode; do not wait for their end."""
        with self._changed:
            if self._child is not None:
                self._child.send((None, "close", episode))

    def _started(self) -> KillableProcess:
        if self._child is None:
            self._child = KillableProcess(_ENTRY, max_message_bytes=_MAX_MESSAGE_BYTES)
        return self._child

    def _receive(self, number: int, child: KillableProcess) -> tuple[Any, str | None]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: number in self._answers or not self._is_read)
                if number in self._answers:
                    return self._answers.pop(number)
                self._is_read = True
            came: list[Any] = []
            try:
                output = [child.output] if child.output_is_open else []
                came = wait([child.socket, *output], _SILENT_SECONDS)
            finally:
                with self._changed:
                    self._is_read = False
                    if came:
                        self._read(child)
                    else:
                        self._end(child, f"gave no sign of life for {_SILENT_SECONDS:g} s")
                    self._changed.notify_all()

    def _read(self, child: KillableProcess) -> None:
        try:
            for message in child.read_messages():
                match message:
                    case {"request": int(number), "answer": answer, "error": str() | None as error}:
                        if number in self._waiting:
                            self._waiting.remove(number)
                            self._answers[number] = answer, error
                    case _:
                        # A sign of life.
                        pass
        except ForgedAnswerError as error:
            self._end(child, f"wrote {error}")
        except EOFError:
            self._end(child, child.kill_and_describe())

    def _end(self, child: KillableProcess, why: str) -> None:
        """Kill the process with all servers, and fail all that is waited for."""
        child.kill()
        self._child = None
        failure = f"the process of the MCP client {why}"
        self._answers |= dict.fromkeys(self._waiting, (None, failure))
        self._waiting.clear()


def request(*content: Any) -> Any:
    """Return the client's answer. Raise `ConfigError` without the client's library."""
    if find_spec("mcp") is None:
        raise ConfigError("tools of MCP servers need the library: pip install 'textpolicy[mcp]'")
    return _client().request(*content)


def close_episode(episode: int) -> None:
    """End the sessions of an episode; do not wait for their end."""
    _client().close(episode)


def drop_episode(episode: int) -> None:
    """End the sessions of an episode before the next request of another one."""
    # The garbage collector may call this in the middle of a request.
    _client().dropped.append(episode)


@lru_cache
def _client() -> _ClientProcess:
    return _ClientProcess()
