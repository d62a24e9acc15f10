"""What the process is doing now: a register that costs little to write and any thread may read.

`doing` marks a piece of work for as long as it lasts. The watchdog of a run, the lines of progress
and the exit code of a command read the register. Nothing here touches mlx.
"""

import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager


class Activity:
    """One piece of work of one thread: what it is, and how many of its parts are done."""

    def __init__(self, text: str, total: int = 0) -> None:
        self.text = text
        self.total = total
        self.done = 0
        self.started = time.monotonic()

    def at(self, done: int, text: str | None = None) -> None:
        """Record how many parts are done, and with `text` a new description of the work."""
        self.done = done
        self.text = text or self.text
        _CLOCK.moved = time.monotonic()

    def advance(self, number: int = 1) -> None:
        """Record that `number` more parts are done; 0 records that the work has not stalled."""
        self.at(self.done + number)

    def __str__(self) -> str:
        return f"{self.text} ({self.done} of {self.total})" if self.total else self.text


class _Clock:
    """When the register last changed, and how often work with `begins` has begun."""

    moved = time.monotonic()
    begun = 0


_CLOCK = _Clock()
# Each thread changes only its own list. The main thread's list comes first.
_STACKS: dict[int, list[Activity]] = {threading.main_thread().ident or 0: []}


@contextmanager
def doing(text: str, total: int = 0, *, begins: bool = False) -> Generator[Activity]:
    """Mark the work `text` of this thread, until the block or the decorated function ends.

    `begins` marks work after which a command has started: sampling, training, writing a model.
    """
    activity, thread = Activity(text, total), threading.get_ident()
    stack = _STACKS.setdefault(thread, [])
    stack.append(activity)
    _CLOCK.moved = activity.started
    _CLOCK.begun += begins
    try:
        yield activity
    finally:
        stack.pop()
        if not stack and thread != threading.main_thread().ident:
            _STACKS.pop(thread, None)
        _CLOCK.moved = time.monotonic()


def now() -> Sequence[Activity]:
    """Return the work of every thread: the main thread first, and the outermost work first."""
    return [activity for stack in list(_STACKS.values()) for activity in list(stack)]


def described() -> str:
    """Return in one line what the process does now, such as "sampling (3 of 64), reward close"."""
    return ", ".join(map(str, now())) or "work without a name"


def seconds_without_a_change() -> float:
    """Return the seconds since the register last changed."""
    return time.monotonic() - _CLOCK.moved


def times_begun() -> int:
    """Return how often work with `begins` has begun, after which a command has started."""
    return _CLOCK.begun
