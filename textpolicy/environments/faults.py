"""Errors around tools, verifiers and environments, which are code of users and libraries."""

from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any

from textpolicy.errors import RewardError, TaskError, TextPolicyError
from textpolicy.user_code import describe_error, is_ctrl_c


def call_tool(tool: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[str, bool]:
    """Return the tool's result as text and True, or the error that the tool raised and False."""
    try:
        # A subclass of str could have methods of its own.
        return "".join([str(tool(**arguments))]), True
    except BaseException as error:
        if is_ctrl_c(error):
            raise
        return f"error: {describe_error(error)}", False


def outcome_of(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """Return what the call returns and None, or None and the error that the call raised."""
    try:
        return call(), None
    except BaseException as error:
        if is_ctrl_c(error):
            raise
        return None, str(error) if isinstance(error, TextPolicyError) else describe_error(error)


async def awaited_outcome(call: Awaitable[Any]) -> tuple[Any, Exception | None]:
    """Return the result and None, or None and the error. A cancellation passes."""
    try:
        return await call, None
    except Exception as error:
        return None, error


def verify_or_zero(verify: Callable[..., Any], answer: str, example: Mapping[str, Any]) -> float:
    """Return the score of another library's verifier, or 0 if the verifier raises an error."""
    try:
        return float(verify(answer, example))
    except Exception:
        return 0.0


class environment_errors:
    """Turn an exception inside the block into a `TaskError` with the environment and `where`.

    Errors of rewards pass, and Ctrl-C does.
    """

    def __init__(self, name: str, where: str) -> None:
        self._place = f"environment {name}, {where}"

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or is_ctrl_c(error) or isinstance(error, RewardError):
            return
        ours = isinstance(error, TextPolicyError)
        raise TaskError(f"{self._place}: {error if ours else describe_error(error)}") from error
