"""The one place where what goes wrong in a sink becomes a sentence instead of the end of a run."""

from collections.abc import Callable


def attempt(action: Callable[[], None]) -> str | None:
    """Do it; what went wrong in one line, or None. Sinks are other people's code and networks."""
    try:
        action()
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None
