"""Lines on standard error for the events of a run that nobody listens to."""

import sys
import time
from collections.abc import Callable
from contextlib import suppress

from textpolicy.experiment.events import RunEvent
from textpolicy.untrusted.terminal import terminal_message

_SECONDS_BETWEEN_STEPS = 5.0


class EventLines:
    """The listener of a run that was started without one. It writes the line of every event.

    Of the steps it writes the first one, and then at most one every five seconds.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_step = float("-inf")

    def __call__(self, event: RunEvent) -> None:
        if event.kind == "step":
            now = self._clock()
            if now - self._last_step < _SECONDS_BETWEEN_STEPS:
                return
            self._last_step = now
        # A closed pipe, or a file that the user's code has closed, must not end a long run.
        with suppress(OSError, ValueError):
            print(terminal_message(event.text), file=sys.stderr, flush=True)
