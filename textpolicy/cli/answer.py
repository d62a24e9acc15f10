"""The answer of a command, as data and as text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer of a command: `data` for --json, `text` for people. None is nothing to print.

    `print_answer` escapes the text, so a command may put any text of other people into it.
    """

    data: Mapping[str, Any] | None
    text: str
    exit_code: int = 0


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Return names and values as two aligned columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
