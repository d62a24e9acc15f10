"""Broad excepts around sinks, which are code and networks of others and must not end a run."""

from collections.abc import Callable


def attempt(action: Callable[[], None]) -> str | None:
    """Run the action. Return the error that the action raised, in one line, or None."""
    try:
        action()
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None
