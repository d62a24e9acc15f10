"""The end of the process, which threads and exit handlers of the user's code cannot put off."""

import multiprocessing
import os
import sys
import threading
import time
from contextlib import suppress
from types import FrameType

from textpolicy.cli.output import print_note
from textpolicy.user_code import has_file_module_name

_PATIENCE = 5.0
_PATIENCE_WITH_SERVICES = 30.0
"""Tracking services upload their last rows when the process ends."""
_SERVICES = ("wandb", "trackio")


def end_soon(exit_code: int, *, seconds: float | None = None) -> None:
    """End the process `seconds` after its main thread, and print what has kept it until then."""
    services = any(name in sys.modules for name in _SERVICES)
    patience = seconds or (_PATIENCE_WITH_SERVICES if services else _PATIENCE)
    threading.Thread(target=_end, args=(exit_code, patience), daemon=True).start()


def _end(exit_code: int, patience: float) -> None:
    # The main thread counts as ended before Python waits for threads and calls exit handlers.
    threading.main_thread().join()
    time.sleep(patience)
    # Standard error may be closed, and the process must end all the same.
    with suppress(OSError, ValueError):
        print_note(
            f"textpolicy: the command is done, but {' and '.join(_describe_leftovers())} kept the "
            f"process for {patience:g} s; it is ended now. Start threads as daemons, or end them"
        )
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(exit_code)


def _describe_leftovers() -> list[str]:
    """Return what keeps the process: threads, child processes, or else an exit handler."""
    main = threading.main_thread()
    # The documented way to the stacks of other threads, in spite of its name.
    frames = sys._current_frames()  # pyright: ignore[reportPrivateUsage]
    threads = [
        f"thread {thread.name!r}{_place(frames.get(thread.ident or 0))}"
        for thread in threading.enumerate()
        if thread is not main and not thread.daemon
    ]
    children = [f"process {child.name!r}" for child in multiprocessing.active_children()]
    return [*threads, *children] or [f"an exit handler{_place(frames.get(main.ident or 0))}"]


def _place(frame: FrameType | None) -> str:
    """Return the file and line of the user's code in this stack, or of its innermost code."""
    stack: list[FrameType] = []
    while frame is not None:
        stack.append(frame)
        frame = frame.f_back
    own = [one for one in stack if has_file_module_name(str(one.f_globals.get("__name__")))]
    if not (chosen := [*own, *stack]):
        return ""
    return f" ({chosen[0].f_code.co_filename}, line {chosen[0].f_lineno})"
