"""The program of the client's process: sessions with MCP servers, by the official client `mcp`.

It works with versions 1.24 to 2.3 of `mcp`, whose sessions and transports have the same names.
"""

import asyncio
import json
import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import anyio
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared import exceptions
from mcp.shared._httpx_utils import create_mcp_http_client
from mcp.types import CONNECTION_CLOSED, PaginatedRequestParams

from textpolicy.environments.faults import awaited_outcome
from textpolicy.environments.mcp.client_process import McpServer
from textpolicy.errors import TaskError, TextPolicyError
from textpolicy.user_code import describe_error
from textpolicy.user_code.killable_process import ParentLink

# mcp 1 has the first name, mcp 2 the second.
_PROTOCOL_ERROR: Any = vars(exceptions).get("McpError") or vars(exceptions)["MCPError"]
_SHARED = 0
"""Stands in place of an episode's number, for a session that all episodes share."""
_BEAT_SECONDS = 1.0
_MAX_PAGES = 100
_MAX_CHARACTERS = 1_000_000
_KEPT_LOG_BYTES = 2000
_MAX_LOG_LINES = 5


def serve_sessions(parent: ParentLink) -> None:
    """Answer requests until the parent closes its end."""
    # The client logs every line of a server that is not a message.
    logging.disable()
    asyncio.run(_Client(parent).run())


class _Session:
    """A session with one server. `opened` is None once the session is ready, or an error."""

    def __init__(self, server: McpServer) -> None:
        self._server = server
        self._scope = anyio.CancelScope()
        self._log = b""
        self.opened: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._client: ClientSession | None = None
        self._task = asyncio.create_task(self._live())

    def end(self) -> None:
        """Stop the server, or say goodbye to it, in the background."""
        self._scope.cancel()

    async def list_tools(self) -> list[Any]:
        """Return the tools as the server describes them, or raise the client's error."""
        assert self._client is not None
        found: list[Any] = []
        page = await self._client.list_tools()
        for _ in range(_MAX_PAGES):
            given: Any = page.model_dump(mode="json", by_alias=True)
            found += [
                {"name": tool["name"], "description": tool["description"] or ""}
                | {"inputSchema": tool["inputSchema"]}
                for tool in given["tools"]
            ]
            if not given["nextCursor"]:
                break
            page = await self._client.list_tools(
                params=PaginatedRequestParams(cursor=given["nextCursor"])
            )
        return found

    async def call(self, name: str, arguments: Mapping[str, Any]) -> tuple[str, bool]:
        """Return the result as text, and whether the tool succeeded; raise the client's error."""
        assert self._client is not None
        result = await self._client.call_tool(name, dict(arguments))
        given: Any = result.model_dump(mode="json", by_alias=True)
        content = given["content"] or [{"text": json.dumps(given["structuredContent"])}]
        text = "\n".join(map(_as_text, content))
        if len(text) > _MAX_CHARACTERS:
            return f"error: {len(text)} characters came; expected at most {_MAX_CHARACTERS}", False
        text = text.encode("utf-8", "replace").decode()
        return (f"error: {text}", False) if given["isError"] else (text, True)

    def last_words(self) -> str:
        """Return the last lines that the server wrote on standard error, indented."""
        lines = self._log.decode("utf-8", "replace").strip().splitlines()[-_MAX_LOG_LINES:]
        return "".join(f"\n    {line}" for line in lines)

    async def _live(self) -> None:
        with self._scope:
            _, error = await awaited_outcome(self._open_and_wait())
            if not self.opened.done():
                self.opened.set_result(_described(error or EOFError("the session was closed")))

    async def _open_and_wait(self) -> None:
        async with AsyncExitStack() as stack:
            read, write, *_ = await stack.enter_async_context(self._transport())
            session = await stack.enter_async_context(ClientSession(read, write))
            seconds = self._server.start_timeout
            _, error = await _bounded(seconds, session.initialize())
            if isinstance(error, TimeoutError):
                raise TaskError(f"it gave no answer of an MCP server within {seconds:g} s")
            if error is not None:
                raise error
            self._client = session
            self.opened.set_result(None)
            await anyio.sleep_forever()

    @asynccontextmanager
    async def _transport(self) -> AsyncGenerator[tuple[Any, ...]]:
        server = self._server
        if server.url:
            async with (
                create_mcp_http_client(headers=dict(server.headers)) as client,
                streamable_http_client(server.url, http_client=client) as streams,
            ):
                yield streams
            return
        program, *arguments = server.command
        parameters = StdioServerParameters(
            command=program, args=arguments, env=dict(server.env), cwd=server.folder
        )
        readable, writable = os.pipe()
        os.set_blocking(readable, False)
        asyncio.get_running_loop().add_reader(readable, self._read_log, readable)
        with os.fdopen(writable, "w") as log:
            async with stdio_client(parameters, errlog=log) as streams:
                log.close()
                yield streams

    def _read_log(self, readable: int) -> None:
        with suppress(BlockingIOError):
            data = os.read(readable, 1 << 16)
            self._log = (self._log + data)[-_KEPT_LOG_BYTES:]
            if not data:
                asyncio.get_running_loop().remove_reader(readable)
                os.close(readable)


class _Client:
    """All sessions, by their server and the number of their episode."""

    def __init__(self, parent: ParentLink) -> None:
        self._parent = parent
        self._sessions: dict[tuple[McpServer, int], _Session] = {}
        self._answering: set[asyncio.Task[None]] = set()
        # Servers that all start at once would all be late.
        self._starts = asyncio.Semaphore(os.cpu_count() or 1)

    async def run(self) -> None:
        beating = asyncio.create_task(self._beat())
        with suppress(EOFError):
            while True:
                number, *content = await asyncio.to_thread(self._parent.receive)
                task = asyncio.create_task(self._answer(number, *content))
                self._answering.add(task)
                task.add_done_callback(self._answering.discard)
        # The guard kills the servers; saying goodbye to each would take seconds.
        beating.cancel()
        os._exit(0)

    async def _beat(self) -> None:
        """Tell the parent each second that this process lives, while the parent waits for it."""
        while True:
            await asyncio.sleep(_BEAT_SECONDS)
            if self._answering:
                self._parent.send(alive=True)

    async def _answer(self, number: int | None, operation: str, *content: Any) -> None:
        operations: dict[str, Callable[..., Awaitable[Any]]] = {
            "list": self._list,
            "call": self._call,
            "close": self._close,
        }
        answer, error = await awaited_outcome(operations[operation](*content))
        if number is not None:
            told = None if error is None else _described(error)
            self._parent.send(request=number, answer=answer, error=told)

    async def _close(self, episode: int) -> None:
        for server, number in [*self._sessions]:
            if number == episode:
                self._end(server, number)

    async def _list(self, server: McpServer) -> list[Any]:
        session = await self._session(server, _SHARED)
        tools, error = await _bounded(server.start_timeout, session.list_tools())
        if not server.is_shared:
            self._end(server, _SHARED)
        if error is not None:
            raise TaskError(f"{server.shown} does not list its tools: {_described(error)}")
        return tools

    async def _call(
        self,
        server: McpServer,
        episode: int,
        tool: str,
        arguments: Mapping[str, Any],
        seconds: float,
    ) -> tuple[str, bool]:
        episode = _SHARED if server.is_shared else episode
        session = await self._session(server, episode)
        result, error = await _bounded(seconds, session.call(tool, arguments))
        if isinstance(error, TimeoutError):
            self._end(server, episode)
            late = f"took longer than {seconds:g} s and was stopped, with its server"
            return f"error: tool {tool} {late}", False
        if _is_closed(error):
            self._end(server, episode)
            return f"error: tool {tool} ended its server{session.last_words()}", False
        return result if error is None else (f"error: {_described(error)}", False)

    async def _session(self, server: McpServer, episode: int) -> _Session:
        """Return the open session; start the server if there is none."""
        session = self._sessions.get((server, episode))
        if session is None or not session.opened.done():
            async with self._starts:
                session = self._sessions.setdefault((server, episode), _Session(server))
                await asyncio.wait({session.opened})
        if error := session.opened.result():
            self._sessions.pop((server, episode), None)
            raise TaskError(f"{server.shown} did not start: {error}{session.last_words()}")
        return session

    def _end(self, server: McpServer, episode: int) -> None:
        if session := self._sessions.pop((server, episode), None):
            session.end()


async def _bounded(seconds: float, call: Awaitable[Any]) -> tuple[Any, Exception | None]:
    """Return the result, or the error: a `TimeoutError` after so many seconds."""
    with anyio.move_on_after(seconds):
        return await awaited_outcome(call)
    return None, TimeoutError()


def _described(error: Exception) -> str:
    """Return our own error's message, or the first of the errors that happened together."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return str(error) if isinstance(error, TextPolicyError) else describe_error(error)


def _is_closed(error: Any) -> bool:
    """Return whether the server has gone."""
    if isinstance(error, _PROTOCOL_ERROR):
        return error.error.code == CONNECTION_CLOSED
    return isinstance(error, anyio.ClosedResourceError | anyio.BrokenResourceError)


def _as_text(content: Mapping[str, Any]) -> str:
    match content:
        case {"text": str(text)} | {"resource": {"text": str(text)}}:
            return text
        case {"type": kind}:
            return f"[{kind}, which is no text]"
        case _:
            return "[no text]"
