"""Turn any exception of the user's code into one of our errors, which says where it happened."""

import signal
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from os.path import abspath
from types import TracebackType
from typing import Any

from textpolicy.errors import TextPolicyError

_MAX_MESSAGE_LENGTH = 1000
_MAX_VALUE_LENGTH = 60


class raise_user_errors_as:
    """Turn an exception inside the block into `error_class`.

    The message names `what` was running, the line in `file` and, where given, the sample.
    Our own errors of other classes pass unchanged: they say that the set-up is wrong. So does
    Ctrl-C, which Python raises as a KeyboardInterrupt as long as its own handler is set. While a
    run handles Ctrl-C itself, a KeyboardInterrupt comes from the user's code and is an error.
    """

    # A class, because a generator could not tell a StopIteration of the block from its own end.

    def __init__(
        self, error_class: type[TextPolicyError], what: str, *, file: str = "", sample: str = ""
    ) -> None:
        self._error_class = error_class
        self._what = what
        self._file = file
        self._sample = sample

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or is_ctrl_c(error):
            return
        if isinstance(error, TextPolicyError) and not isinstance(error, self._error_class):
            return
        file, frames = self._file, traceback.extract_tb(trace)
        lines = [f.lineno for f in frames if file and abspath(f.filename) == abspath(file)]
        where = f" ({file}, line {lines[-1]})" if lines else ""
        message = f"{self._what} raised {describe_error(error)}{where}"
        sample = [self._sample] if self._sample else []
        raise self._error_class("\n  ".join([message, *sample])) from error


def complete_future(
    future: Future[Any], before: Callable[[], None], call: Callable[[], Any]
) -> None:
    """Call `call`, then `before`, and then give the future the result or the error of the call."""
    try:
        result = call()
    except BaseException as error:
        before()
        future.set_exception(error)
    else:
        before()
        future.set_result(result)


def is_ctrl_c(error: BaseException) -> bool:
    """Return whether Python's own handler of Ctrl-C may have raised this error."""
    own_handler = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return type(error) is KeyboardInterrupt and own_handler


def describe_error(error: BaseException) -> str:
    """Return the type and the message of the user's error; its `__str__` may raise as well."""
    try:
        # A subclass of str could have methods of its own.
        text = str.__getitem__(str(error), slice(_MAX_MESSAGE_LENGTH + 1))
    except BaseException as second:
        if is_ctrl_c(second):
            raise
        text = "<its message cannot be shown>"
    cut = text if len(text) <= _MAX_MESSAGE_LENGTH else f"{text[:_MAX_MESSAGE_LENGTH]}…"
    return f"{type_name(error)}: {cut}"


def describe_value(value: Any) -> str:
    """Return the start of the value's `repr`, which is the user's code, and its type."""
    try:
        shown = value[:_MAX_VALUE_LENGTH] if type(value) in (str, bytes) else value
        text = " ".join(str.__getitem__(repr(shown), slice(_MAX_VALUE_LENGTH + 2)).split())
    except BaseException as error:
        if is_ctrl_c(error):
            raise
        return f"an object whose repr raises {type_name(error)} ({type_name(value)})"
    cut = text if len(text) <= _MAX_VALUE_LENGTH + 1 else f"{text[:_MAX_VALUE_LENGTH]}…"
    return f"{cut} ({type_name(value)})"


def type_name(value: object) -> str:
    """Return the name of the value's class, even if its metaclass hides the name."""
    name: str = type.__dict__["__name__"].__get__(type(value))
    return name[:_MAX_VALUE_LENGTH]
