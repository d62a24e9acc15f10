"""Keep what the run relies on in its own process, whatever the user's code changes there.

The user's code has a working directory of its own: what it changes with `chdir` holds for its next
call and not for the run. Random states are not kept: a checkpoint holds them, and the library draws
from none.
"""

import os
import signal
import sys
import threading
import warnings
from contextlib import suppress
from types import TracebackType
from typing import Any, ClassVar, TextIO, cast

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STREAMS = {"stdout": 1, "stderr": 2}


class keep_working_directory:
    """Run the block in the user's working directory; `changed` tells whether it changed there."""

    users: str | None = None
    """The directory in which the user's code left the process, if that is not the run's own."""

    def __init__(self) -> None:
        self.changed = False

    def __enter__(self) -> "keep_working_directory":
        self._own = _working_directory()
        if self.users is not None:
            # The directory may have been removed since.
            with suppress(OSError):
                os.chdir(self.users)
        self._begun = _working_directory()
        return self

    def __exit__(self, *error: object) -> None:
        now = _working_directory()
        self.changed = now != self._begun
        if now != self._own and self._own is not None:
            keep_working_directory.users = now
            with suppress(OSError):
                os.chdir(self._own)


class keep_process_state:
    """Restore after the block what the user's code changed; `changed` then names it.

    These are the working directory, the handlers of SIGINT and SIGTERM, an alarm, standard output
    and error, the hooks for exceptions, the recursion limit, and what warnings and numpy's
    floating-point errors do.

    Each block in the main thread restores the handlers and the alarm, because only the main thread
    can set handlers. Threads share the rest, except numpy's errors: if blocks of several threads
    overlap, the last one that ends restores what was there before the first one began.
    """

    _lock = threading.Lock()
    _blocks_by_thread: ClassVar[dict[int, int]] = {}
    _left: ClassVar[list["_SavedState"]] = []
    """What the first of several overlapping blocks has saved, if it ended before the others."""

    def __init__(self) -> None:
        self.changed: list[str] = []
        self._saved: _SavedState | None = None
        self._signals: _SavedSignals | None = None

    def __enter__(self) -> "keep_process_state":
        # Processes that only call rewards do not import numpy.
        self._numpy: Any = sys.modules.get("numpy")
        self._numpy_errors: dict[str, Any] = self._numpy.geterr() if self._numpy else {}
        if threading.current_thread() is threading.main_thread():
            self._signals = _SavedSignals()
        thread = threading.get_ident()
        with self._lock:
            if self._blocks_by_thread.keys() <= {thread}:
                self._saved = _SavedState()
            self._blocks_by_thread[thread] = self._blocks_by_thread.get(thread, 0) + 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._signals:
            self.changed += self._signals.restore()
        thread = threading.get_ident()
        with self._lock:
            self._blocks_by_thread[thread] -= 1
            if not self._blocks_by_thread[thread]:
                del self._blocks_by_thread[thread]
            if self._blocks_by_thread.keys() <= {thread}:
                last = not self._blocks_by_thread and self._left
                saved = self._left.pop() if last else self._saved
                self.changed += saved.restore() if saved else []
            elif self._saved and thread in self._blocks_by_thread:
                self._saved.discard()
            elif self._saved:
                self._left.append(self._saved)
        if self._numpy and self._numpy.geterr() != self._numpy_errors:
            self._numpy.seterr(**self._numpy_errors)
            self.changed.append("numpy's handling of floating-point errors")


class _SavedSignals:
    """The handlers of signals and the alarm. Made and restored in the main thread only."""

    def __init__(self) -> None:
        self._handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        self._alarm = _alarm_runs()

    def restore(self) -> list[str]:
        """Restore the handlers, stop an alarm that is new, and return the names of the changes."""
        changed: list[str] = []
        for number, handler in self._handlers.items():
            # None is a handler that Python code did not set, and cannot set.
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)
                changed.append(f"the handler of {number.name}")
        return changed + ([] if self._alarm else _stop_alarm())


class _SavedState:
    """What all threads share of the state of the process, at the time when this object was made."""

    def __init__(self) -> None:
        self.changed: list[str] = []
        self._folder = keep_working_directory().__enter__()
        self._streams: dict[str, TextIO] = {name: getattr(sys, name) for name in _STREAMS}
        self._descriptors = {number: _duplicate(number) for number in _STREAMS.values()}
        self._recursion = sys.getrecursionlimit()
        self._filters = list(warnings.filters)
        self._hooks = sys.excepthook, threading.excepthook
        self._alarm = _alarm_runs()

    def restore(self) -> list[str]:
        """Restore the state, and return the names of what had changed."""
        self._folder.__exit__()
        if self._folder.changed:
            self.changed.append("the working directory")
        if not self._alarm:
            self.changed += _stop_alarm()
        if (sys.excepthook, threading.excepthook) != self._hooks:
            sys.excepthook, threading.excepthook = self._hooks
            self.changed.append("the handlers of errors that nobody catches")
        if sys.getrecursionlimit() != self._recursion:
            sys.setrecursionlimit(self._recursion)
            self.changed.append("the recursion limit")
        if list(warnings.filters) != self._filters:
            # Python also forgets which warnings it has shown, as it must for other filters.
            warnings.resetwarnings()
            cast("list[Any]", warnings.filters)[:] = self._filters
            self.changed.append("the filters of warnings")
        for name, number in _STREAMS.items():
            self._restore_stream(name, number)
        return self.changed

    def discard(self) -> None:
        """Close what is held for the time of the restoration."""
        for saved in self._descriptors.values():
            if saved is not None:
                os.close(saved)

    def _restore_stream(self, name: str, number: int) -> None:
        saved, before = self._descriptors[number], self._streams[name]
        changed = getattr(sys, name) is not before or before.closed
        if saved is not None:
            if not _are_same_file(saved, number):
                os.dup2(saved, number)
                changed = True
            os.close(saved)
        if changed:
            if before.closed and saved is not None:
                before = open(number, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
            setattr(sys, name, before)
            self.changed.append(f"standard {'output' if number == 1 else 'error'}")


def _alarm_runs() -> bool:
    return signal.getitimer(signal.ITIMER_REAL)[0] > 0


def _stop_alarm() -> list[str]:
    """Stop the alarm, which would go off in the middle of the trainer; name it if it ran."""
    if not _alarm_runs():
        return []
    signal.setitimer(signal.ITIMER_REAL, 0)
    return ["an alarm that was left running"]


def _working_directory() -> str | None:
    with suppress(OSError):
        return os.getcwd()
    return None


def _duplicate(number: int) -> int | None:
    with suppress(OSError):
        return os.dup(number)
    return None


def _are_same_file(first: int, second: int) -> bool:
    with suppress(OSError):
        return os.path.sameopenfile(first, second)
    return False
