"""Broad excepts around the work for one request, which must not end the work for the others."""

from collections.abc import Callable
from typing import TypeVar

from textpolicy.errors import TextPolicyError

_T = TypeVar("_T")


def attempt_step(step: Callable[[], _T]) -> tuple[_T | None, str | None]:
    """Return what a step returns and None, or None and the error that the step raised."""
    try:
        return step(), None
    except Exception as error:
        return None, describe_failure(error)


def describe_failure(error: Exception) -> str:
    """Return an error in one line."""
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, TextPolicyError) else f"{type(error).__name__}: {text}"
