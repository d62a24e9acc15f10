"""The boundary to the user's code: whatever it raises goes on as one error that says where."""

import traceback
from collections.abc import Generator
from contextlib import contextmanager

from textpolicy.errors import RewardError, TextPolicyError

_LONGEST = 1000


@contextmanager
def user_code(what: str, *, file: str, sample: str = "") -> Generator[None, None, None]:
    """Inside the block, an exception becomes a `RewardError` naming `what`, line and sample.

    Our own errors about a set-up that cannot work pass as they are: no sample is to blame.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, TextPolicyError) and not isinstance(error, RewardError):
            raise
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        where = f" ({file}, line {lines[-1]})" if lines else ""
        message = f"{what} raised {type(error).__name__}: {_text(error)}{where}"
        raise RewardError("\n  ".join([message, sample] if sample else [message])) from error


def _text(error: BaseException) -> str:
    """What the error says, cut; its `__str__` is the user's code as well."""
    try:
        text = str(error)
    except Exception:
        return "<its message cannot be shown>"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
