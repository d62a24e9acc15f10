"""The boundary to the user's code: whatever it raises goes on as one error that says where."""

import traceback
from collections.abc import Generator
from contextlib import contextmanager

from textpolicy.errors import RewardError, TextPolicyError


@contextmanager
def user_code(what: str, *, file: str, sample: str = "") -> Generator[None, None, None]:
    """Inside the block, an exception becomes a `RewardError` naming `what`, line and sample."""
    try:
        yield
    except TextPolicyError:
        raise
    except (Exception, SystemExit) as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        where = f" ({file}, line {lines[-1]})" if lines else ""
        message = f"{what} raised {type(error).__name__}: {error}{where}"
        raise RewardError("\n  ".join([message, sample] if sample else [message])) from error
