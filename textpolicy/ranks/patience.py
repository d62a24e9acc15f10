"""Ends a rank that waits too long for the others, from a thread that never touches mlx.

Python's signal handlers do not run while mlx waits for a message, so only a thread or another
process can end such a wait.
"""

import os
import sys
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

LAUNCHER = "TEXTPOLICY_LAUNCHER"
"""The environment variable with the process that started this rank, if `--ranks` did."""
_WAIT = 0.25


class Patience:
    """The longest wait for other ranks, in seconds; without a number a wait may last for ever.

    A wait that lasts longer ends the process with the exit code 75, and so does the death of the
    process that started the rank. `tell` is called with the reason, on another thread.
    """

    def __init__(
        self, seconds: float | None, *, tell: Callable[[str], None] = warnings.warn
    ) -> None:
        self.seconds = seconds
        self._tell = tell
        self._began: float | None = None
        self._launcher = int(os.environ.get(LAUNCHER, 0))
        # Between a rank of Open MPI and its launcher is mpirun.
        self._is_child = os.getppid() == self._launcher
        if seconds is not None or self._launcher:
            Thread(target=self._watch, name="patience", daemon=True).start()

    @contextmanager
    def waiting(self) -> Generator[None]:
        """Mark the block as a wait for other ranks."""
        self._began = time.monotonic()
        try:
            yield
        finally:
            self._began = None

    def _watch(self) -> None:
        while True:
            time.sleep(_WAIT)
            if self._launcher and self._is_orphan():
                self._end("the process that started this rank is gone")
            began = self._began
            if self.seconds and began is not None and time.monotonic() - began > self.seconds:
                self._end(
                    f"no answer of the other ranks in {self.seconds:g} s, which is the "
                    "--rank-deadline. Another rank hangs, or the network is down"
                )

    def _is_orphan(self) -> bool:
        if self._is_child:
            return os.getppid() != self._launcher
        return has_ended(self._launcher)

    def _end(self, why: str) -> None:
        try:
            self._tell(f"{why}. The process ends; a run with a checkpoint can be resumed")
        finally:
            os._exit(os.EX_TEMPFAIL)


def has_ended(process: int) -> bool:
    """Return whether a process has ended. Its parent may not have waited for it yet."""
    try:
        os.kill(process, 0)
        if sys.platform != "linux":
            return False
        status = Path("/proc", str(process), "stat").read_text("utf-8", "replace")
    except (ProcessLookupError, FileNotFoundError):
        return True
    # The name of the program stands in parentheses, and may hold spaces.
    return status.rpartition(")")[2].split()[0] in ("Z", "X")
