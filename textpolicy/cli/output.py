"""The only place that writes to the terminal: every character that could control it is spelled out.

Whatever is printed may quote a model, a data file, the name of a folder or the user's code. The
panel of a run writes by itself, through `textpolicy/tracking/console.py`, with the same escapes.
"""

import io
import os
import shutil
import sys
import threading
import traceback
import warnings
from types import TracebackType
from typing import Any

from textpolicy.untrusted.terminal import TextStream, terminal_message, terminal_safe


def print_answer(text: str, *, end: str = "\n") -> None:
    """Print the result of a command, or with `end` a piece of it, to standard output."""
    try:
        print(terminal_safe(text), end=end, flush=True)
    except BrokenPipeError:
        forget_closed_pipes()


def rewrite_line(text: str) -> None:
    """Print a line over the last line of the terminal, and stay on it."""
    print("\r", end="")
    print_answer(text, end="")


def terminal_width() -> int | None:
    """Return how wide the terminal is, or None if standard output is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def forget_closed_pipes() -> None:
    """Drop what a closed pipe did not take, because Python would write it again at exit.

    A reader such as `head` closes the pipe after its lines, and the exit code would be 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except ValueError:
            continue  # The user's code has closed the stream.


def print_note(text: str, *, end: str = "\n") -> None:
    """Print progress or an error message of bounded length to standard error."""
    print(terminal_message(text), end=end, file=sys.stderr, flush=True)


def print_warning(message: Warning | str, *_where: Any, **_rest: Any) -> None:
    """Print a warning without the line of our code that gave it, which says nothing to a user."""
    print_note(f"warning: {message}")


def error_stream() -> TextStream:
    """Return standard error, for the panel of a run."""
    return _StandardError()


class _StandardError:
    """Standard error as it is at each write: the user's code may close it, and a run opens it."""

    @property
    def encoding(self) -> str:
        return sys.stderr.encoding

    def write(self, text: str, /) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()

    def isatty(self) -> bool:
        return sys.stderr.isatty()

    def fileno(self) -> int:
        return sys.stderr.fileno()


def guard_terminal() -> None:
    """Let Python's own messages, which are warnings and tracebacks, pass the same escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.excepthook = _print_traceback
    threading.excepthook = _print_traceback_of_thread
    warnings.showwarning = print_warning


def _print_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    text = "".join(traceback.format_exception(kind, error, trace)).rstrip("\n")
    print(terminal_safe(text), file=sys.stderr, flush=True)


def _print_traceback_of_thread(args: threading.ExceptHookArgs, /) -> None:
    # `sys.exit` in a thread ends the thread and is no error.
    if args.exc_type is not SystemExit:
        _print_traceback(args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback)
