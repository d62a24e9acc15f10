"""Broad excepts around tools, verifiers and environments, which are code of users and libraries."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

from textpolicy.errors import RewardError, TaskError, TextPolicyError


def call_tool(tool: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[str, bool]:
    """Return the tool's result as text and True, or the error that the tool raised and False."""
    try:
        return str(tool(**arguments)), True
    except Exception as error:
        return f"error: {type(error).__name__}: {error}", False


def verify_or_zero(verify: Callable[..., Any], answer: str, example: Mapping[str, Any]) -> float:
    """Return the score of another library's verifier, or 0 if the verifier raises an error."""
    try:
        return float(verify(answer, example))
    except Exception:
        return 0.0


@contextmanager
def environment_errors(name: str, where: str) -> Generator[None, None, None]:
    """Turn an exception inside the block into a `TaskError` with the environment and `where`."""
    try:
        yield
    except RewardError:
        raise
    except TextPolicyError as error:
        raise TaskError(f"environment {name}, {where}: {error}") from error
    except Exception as error:
        raise TaskError(f"environment {name}, {where}: {type(error).__name__}: {error}") from error
