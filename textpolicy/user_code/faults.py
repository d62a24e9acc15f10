"""Turn any exception of the user's code into one of our errors, which says where it happened."""

import traceback
from collections.abc import Generator
from contextlib import contextmanager
from os.path import abspath

from textpolicy.errors import TextPolicyError

_MAX_MESSAGE_LENGTH = 1000


@contextmanager
def raise_user_errors_as(
    error_class: type[TextPolicyError], what: str, *, file: str = "", sample: str = ""
) -> Generator[None, None, None]:
    """Turn an exception inside the block into `error_class`.

    The message names `what` was running, the line in `file` and, where given, the sample.
    Our own errors of other classes pass unchanged: they say that the set-up is wrong.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, TextPolicyError) and not isinstance(error, error_class):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if file and abspath(f.filename) == abspath(file)]
        where = f" ({file}, line {lines[-1]})" if lines else ""
        message = f"{what} raised {type(error).__name__}: {_message_of(error)}{where}"
        raise error_class("\n  ".join([message, sample] if sample else [message])) from error


def _message_of(error: BaseException) -> str:
    """Return the error's message, cut. The error's `__str__` is the user's code as well."""
    try:
        text = str(error)
    except Exception:
        return "<its message cannot be shown>"
    return text if len(text) <= _MAX_MESSAGE_LENGTH else f"{text[:_MAX_MESSAGE_LENGTH]}…"
