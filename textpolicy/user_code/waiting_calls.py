"""Calls of the user's code that may wait for something: they then wait in threads, side by side."""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from textpolicy.user_code.faults import complete_future

MAX_THREADS = 64
"""The number of calls that may wait at the same time."""
_IDLE_SECONDS = 1.0
"""How long a thread waits for a further call before it ends."""
_WAIT_SECONDS = 0.03
_OBSERVED_CALLS = 3
_MAX_BUSY_SHARE = 0.1


class WaitingCalls:
    """Runs calls at once, as long as they are quick or compute; runs calls that wait in threads.

    Calls wait if each of the last three took 30 ms or more and used the processor for less than a
    tenth of the time. Calls that compute would only compete with the caller, and a quick call is
    over before a thread has started; so both run in the caller's thread, in the order of the calls.
    """

    def __init__(self) -> None:
        self._waited: deque[bool] = deque([False], maxlen=_OBSERVED_CALLS)
        self._changed = threading.Condition()
        self._queued: deque[Callable[[], None]] = deque()
        self._threads = self._idle = 0

    @property
    def wait(self) -> bool:
        """Whether the last calls have waited, so that the next one runs in a thread."""
        return all(self._waited)

    def start(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Return the future of a call, which is done already if the call ran at once."""
        future: Future[Any] = Future()
        job = partial(self._run, future, partial(call, *arguments))
        if not self.wait:
            job()
            return future
        with self._changed:
            self._queued.append(job)
            self._changed.notify()
            if len(self._queued) <= self._idle or self._threads >= MAX_THREADS:
                return future
            self._threads += 1
        # A thread that waits for ever must not keep the process from ending.
        threading.Thread(target=self._work, name="waiting call", daemon=True).start()
        return future

    def drop(self) -> None:
        """Forget the calls that have not begun. Their futures never have a result."""
        with self._changed:
            self._queued.clear()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                self._changed.wait_for(lambda: self._queued, _IDLE_SECONDS)
                self._idle -= 1
                if not self._queued:
                    self._threads -= 1
                    return
                job = self._queued.popleft()
            job()

    def _run(self, future: Future[Any], call: Callable[[], Any]) -> None:
        started, computed = time.perf_counter(), time.thread_time()
        complete_future(future, partial(self._observe, started, computed), call)

    def _observe(self, started: float, computed: float) -> None:
        seconds, busy = time.perf_counter() - started, time.thread_time() - computed
        self._waited.append(seconds >= _WAIT_SECONDS and busy < _MAX_BUSY_SHARE * seconds)
