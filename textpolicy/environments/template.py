"""Prompt templates: text with column names in braces. Data, so nothing in one is ever run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from string import Formatter
from typing import Any

from textpolicy.environments.data_files import DataRow
from textpolicy.errors import DataError
from textpolicy.types import Message, Prompt

Template = str | Sequence[Message]
"""Text, or messages whose contents are text, with `{column}` where a row's value goes."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Literal text, and the column whose value follows it."""

    text: str
    column: str | None


def fill_template(template: Template, row: DataRow) -> Prompt:
    """The prompt of one row. Values are put in as they are: braces inside them mean nothing."""
    if isinstance(template, str):
        return _fill_text(template, row)
    return [
        dict(message) | {"content": _fill_text(message["content"], row)} for message in template
    ]


def template_columns(template: Template) -> list[str]:
    """The columns that the template asks for."""
    texts = [template] if isinstance(template, str) else [m["content"] for m in template]
    pieces = [piece for text in texts for piece in _parse(text)]
    return list(dict.fromkeys(piece.column for piece in pieces if piece.column is not None))


def check_template(template: Template, row: DataRow) -> None:
    """Raise `DataError` if the template asks for a column that the row does not have."""
    for column in template_columns(template):
        if column not in row:
            near = get_close_matches(column, list(row), n=1)
            hint = f" Did you mean {{{near[0]}}}?" if near else ""
            raise DataError(
                f"the prompt template asks for {{{column}}}; the rows have {list(row)}.{hint}"
            )


def _fill_text(template: str, row: DataRow) -> str:
    return "".join(
        piece.text + ("" if piece.column is None else _to_text(piece.column, row))
        for piece in _parse(template)
    )


def _to_text(column: str, row: Mapping[str, Any]) -> str:
    check_template(f"{{{column}}}", row)
    value = row[column]
    if not isinstance(value, str | int | float):
        raise DataError(
            f"column {column!r} holds {value!r:.60} ({type(value).__name__}), which is no text: a "
            "template takes strings and numbers"
        )
    return str(value)


def _parse(template: str) -> list[_Piece]:
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise DataError(
            f"the prompt template {template!r} does not read: {error}. Columns stand in braces, "
            "{column}; a brace itself is written twice, {{ or }}"
        ) from error
    for _, column, form, conversion in parsed:
        if column is not None and (form or conversion or not column or set(column) & set(".[]")):
            raise DataError(
                f"the prompt template {template!r} has more than a column's name in its braces; "
                "expected {column} alone, without attributes, indices, formats or conversions"
            )
    return [_Piece(text, column) for text, column, _, _ in parsed]
