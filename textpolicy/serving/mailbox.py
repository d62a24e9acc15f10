"""Callbacks of the engine's thread, run on the event loop of the server's thread."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from threading import Lock


class LoopMailbox:
    """Runs callbacks of other threads on the event loop; those of one step share one wake-up."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = Lock()
        self._callbacks: list[Callable[[], object]] = []

    def post(self, callback: Callable[[], object]) -> None:
        """Run the callback on the loop soon. After the loop's end nothing happens."""
        with self._lock:
            self._callbacks.append(callback)
            is_first = len(self._callbacks) == 1
        if is_first:
            # RuntimeError: the loop is closed, and nobody waits for an answer any more.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        with self._lock:
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()
