"""A request's way through the engine, for the coroutine that answers the request."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial

from textpolicy.serving.engine_queue import ServedEngine
from textpolicy.serving.generation_request import Generation, GenerationRequest
from textpolicy.serving.mailbox import LoopMailbox
from textpolicy.serving.security import Receive


class ClientGoneError(Exception):
    """The client has closed the connection before its answer was complete."""


class EngineJob:
    """A request that was submitted to the engine. Use it on the event loop only."""

    def __init__(
        self,
        served: ServedEngine,
        mailbox: LoopMailbox,
        request: GenerationRequest,
        *,
        stream: bool,
    ) -> None:
        self._served = served
        self._changed = asyncio.Event()
        tell = partial(mailbox.post, self._changed.set)
        self.generation = served.submit(request, lambda _: tell(), each_token=stream)

    async def wait(self, receive: Receive) -> Generation:
        """Return the request at its next change. Cancel it and raise if the client goes away."""
        gone = asyncio.ensure_future(_client_leaves(receive))
        changed = asyncio.ensure_future(self._changed.wait())
        try:
            await asyncio.wait({gone, changed}, return_when=asyncio.FIRST_COMPLETED)
            if not changed.done():
                raise ClientGoneError
        finally:
            if not changed.done():
                self.cancel()
            for task in (gone, changed):
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
        self._changed.clear()
        if self.generation.refusal is not None:
            raise self.generation.refusal
        return self.generation

    async def changes(self, receive: Receive) -> AsyncIterator[Generation]:
        """Yield the request after each change, up to its end."""
        while True:
            # Whether it is done must be known before its tokens are read.
            done = self.generation.done
            if done and self.generation.refusal is not None:
                raise self.generation.refusal
            yield self.generation
            if done:
                return
            await self.wait(receive)

    def cancel(self) -> None:
        """Free the places of the request in the engine, unless it is done."""
        if not self.generation.done:
            self._served.cancel(self.generation)


async def _client_leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
