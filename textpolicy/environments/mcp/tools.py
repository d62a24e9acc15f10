"""`mcp_tools`: the tools of an MCP server, for `TOOLS` of an environment file and for `ToolEnv`."""

import inspect
import keyword
import shlex
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal

from textpolicy.environments.mcp.client_process import (
    McpServer,
    close_episode,
    drop_episode,
    request,
)
from textpolicy.errors import ConfigError, TaskError

_MAX_TOOLS = 200
_MAX_NAME = 128
_episodes = count(1)


@dataclass(frozen=True, kw_only=True)
class McpTool:
    """A tool of an MCP server. `description` is its JSON schema in the form that models read.

    A call from outside of a `ToolEnv` is an episode of its own.
    """

    server: McpServer
    name: str
    description: Mapping[str, Any] = field(hash=False)

    @property
    def __name__(self) -> str:
        return self.name

    @property
    def __signature__(self) -> inspect.Signature:
        """The parameters by position, for calls that are written as in Python."""
        names = self.description["function"]["parameters"]["properties"]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        usable = [name for name in names if name.isidentifier() and not keyword.iskeyword(name)]
        return inspect.Signature([inspect.Parameter(name, kind) for name in usable])

    def __call__(self, **arguments: Any) -> str:
        episode = McpEpisode()
        try:
            text, returned = episode.call(self, arguments)
        finally:
            episode.close()
        if not returned:
            raise TaskError(text.removeprefix("error: "))
        return text


class McpEpisode:
    """The sessions with MCP servers of one episode. A session opens at the first call.

    `timeout` replaces the time limit of the servers. A server of which all episodes share one
    session is not closed with the episode.
    """

    def __init__(self, timeout: float | None = None) -> None:
        self._timeout = timeout
        self._number = next(_episodes)
        self._unclosed: weakref.finalize[..., McpEpisode] | None = None

    def call(self, tool: McpTool, arguments: Mapping[str, Any]) -> tuple[str, bool]:
        """Return the tool's text and True, or the text of an error and False.

        Raise `TaskError` if the server cannot be started or reached.
        """
        server = tool.server
        self._unclosed = self._unclosed or weakref.finalize(self, drop_episode, self._number)
        seconds = self._timeout or server.timeout
        answer = request("call", server, self._number, tool.name, dict(arguments), seconds)
        match answer:
            case [str(text), bool(returned)]:
                return text, returned
            case _:
                raise TaskError(f"tool {tool.name}: the MCP client answered {answer!r:.80}")

    def close(self) -> None:
        """End the sessions of this episode."""
        if self._unclosed and self._unclosed.detach():
            close_episode(self._number)


def mcp_tools(
    server: str | Sequence[str],
    *,
    only: Sequence[str] | None = None,
    sessions: Literal["episode", "run"] = "episode",
    timeout: float = 60.0,
    start_timeout: float = 60.0,
    env: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
) -> list[McpTool]:
    """Return the tools of an MCP server, for which the server is started once.

    `server` is the command of a server on standard input and output, as a text or as a list, or the
    URL of a server over streamable HTTP. `only` chooses tools by name. Each episode has a server
    process, or a session at the URL, of its own; with "run", all episodes share one. A call that
    takes more than `timeout` seconds is ended with its server. A server may take
    `start_timeout` seconds to start. A server process gets the environment variables PATH, HOME,
    USER, LOGNAME, SHELL and TERM, and `env`. `headers` go to the URL.
    """
    url = server if isinstance(server, str) and server.startswith(("http://", "https://")) else ""
    command = () if url else shlex.split(server) if isinstance(server, str) else server
    described = McpServer(
        url=url,
        command=tuple(command),
        folder=str(Path.cwd()),
        env=tuple((env or {}).items()),
        headers=tuple((headers or {}).items()),
        is_shared=sessions == "run",
        timeout=timeout,
        start_timeout=start_timeout,
    )
    _check(described, sessions)
    listed = request("list", described)
    if not isinstance(listed, list) or len(listed) > _MAX_TOOLS:
        raise TaskError(
            f"{described.shown} lists more than {_MAX_TOOLS} tools; no model can read so many"
        )
    tools = {tool.name: tool for tool in (_tool(described, given) for given in listed)}
    unknown = [name for name in only or () if name not in tools]
    if unknown or not tools:
        raise TaskError(
            f"{described.shown} has no tools {unknown or ''}; its tools are {list(tools) or 'none'}"
        )
    return [tools[name] for name in only or tools]


def _check(server: McpServer, sessions: str) -> None:
    if not server.url and not server.command:
        raise ConfigError(
            "mcp_tools got an empty command. Write the command or the URL of a server"
        )
    if sessions not in ("episode", "run"):
        raise ConfigError(f'sessions is {sessions!r}; expected "episode" or "run"')
    if min(server.timeout, server.start_timeout) <= 0:
        raise ConfigError(
            f"timeout is {server.timeout:g} and start_timeout is {server.start_timeout:g}; "
            "expected seconds above 0"
        )
    if (server.headers and not server.url) or (server.env and server.url):
        raise ConfigError("headers are for the URL of a server, and env is for a command")


def _tool(server: McpServer, given: Any) -> McpTool:
    """Return the tool as its server describes it, or raise `TaskError`."""
    match given:
        case {"name": str(name), "description": str(text), "inputSchema": dict(schema)} if (
            0 < len(name) <= _MAX_NAME
        ):
            pass
        case _:
            raise TaskError(f"{server.shown} describes a tool as {given!r:.80}; expected its name")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise TaskError(f"{server.shown}: the schema of tool {name} has no list of parameters")
    parameters = schema | {"properties": properties, "required": required}
    return McpTool(
        server=server,
        name=name,
        description={
            "type": "function",
            "function": {"name": name, "description": text, "parameters": parameters},
        },
    )
