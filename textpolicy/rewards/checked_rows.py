"""The rows of a check: their prompts and right answers, from columns of the usual names."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from textpolicy.errors import ConfigError
from textpolicy.types import Prompt

PROMPT_COLUMNS = ("prompt", "question", "problem", "instruction", "input")
"""Usual names of a column of prompts, in the order in which they are looked for."""
GOLD_COLUMNS = ("gold", "answer", "solution", "target", "completion", "output")
"""Usual names of a column of right answers, in the order in which they are looked for."""

RowColumn = str | Callable[[Mapping[str, Any]], Any] | None
"""A column of the rows, or a function of a row."""


@dataclass(frozen=True, slots=True)
class CheckedRow:
    """A row whose prompt and right answer, if it is known, are not columns.

    `asked` is what a model is asked, if that is more than the prompt.
    """

    prompt: str
    example: Mapping[str, Any]
    gold: str | None = None
    asked: Prompt | None = None


def checked_rows(
    rows: Sequence[Mapping[str, Any] | CheckedRow],
    *,
    prompt: RowColumn = None,
    gold: RowColumn = None,
) -> list[CheckedRow]:
    """Return the rows with their prompts and right answers, from columns of the usual names."""
    columns = () if isinstance(rows[0], CheckedRow) else rows[0]
    prompt = prompt or prompt_column_of(columns)
    gold = gold or gold_column_of(columns)
    return [
        row
        if isinstance(row, CheckedRow)
        else CheckedRow(column_text(row, prompt) or "", row, column_text(row, gold))
        for row in rows
    ]


def prompt_column_of(columns: Container[str]) -> str | None:
    """Return the column of prompts among `columns`, by the usual names, or None."""
    return next((name for name in PROMPT_COLUMNS if name in columns), None)


def gold_column_of(columns: Container[str]) -> str | None:
    """Return the column of right answers among `columns`, by the usual names, or None."""
    return next((name for name in GOLD_COLUMNS if name in columns), None)


def column_text(row: Mapping[str, Any], column: RowColumn) -> str | None:
    """Return the text in a column of the row, or None without a column."""
    if column is None:
        return None
    if not isinstance(column, str):
        return str(column(row))
    if column not in row:
        raise ConfigError(f"no column {column!r}; the rows have {', '.join(row)}")
    value = row[column]
    # As in a run, the text of a conversation is its last message.
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        return str(value[-1].get("content"))
    return str(value)
