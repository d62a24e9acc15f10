"""The boundary to tools and to environments of others: what they raise goes on as text or ours."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

from textpolicy.errors import RewardError, TaskError, TextPolicyError


def call_tool(tool: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[str, bool]:
    """What the tool returned, as text, and True; or the error that it raised, and False."""
    try:
        return str(tool(**arguments)), True
    except Exception as error:
        return f"error: {type(error).__name__}: {error}", False


def verify_or_zero(verify: Callable[..., Any], answer: str, example: Mapping[str, Any]) -> float:
    """What a verifier of another library says of the answer; 0 if it cannot even read it."""
    try:
        return float(verify(answer, example))
    except Exception:
        return 0.0


@contextmanager
def environment_errors(name: str, where: str) -> Generator[None, None, None]:
    """Inside the block, an exception becomes a `TaskError` naming the environment and `where`."""
    try:
        yield
    except RewardError:
        raise
    except TextPolicyError as error:
        raise TaskError(f"environment {name}, {where}: {error}") from error
    except Exception as error:
        raise TaskError(f"environment {name}, {where}: {type(error).__name__}: {error}") from error
