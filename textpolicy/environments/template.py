"""Prompt templates: text with column names in braces. No part of a template is ever executed."""

from collections.abc import Sequence
from difflib import get_close_matches
from string import Formatter

from textpolicy.environments.data_files import DataRow
from textpolicy.errors import DataError
from textpolicy.types import Message, Prompt

Template = str | Sequence[Message]
"""Text, or messages with text contents. `{column}` stands for the row's value in that column."""


def fill_template(template: Template, row: DataRow) -> Prompt:
    """Return the prompt of one row. Braces inside the row's values stay as they are."""
    if isinstance(template, str):
        return _fill_text(template, row)
    return [
        dict(message) | {"content": _fill_text(message["content"], row)} for message in template
    ]


def template_columns(template: Template) -> list[str]:
    """Return the columns that the template names, each once."""
    texts = [template] if isinstance(template, str) else [m["content"] for m in template]
    columns = [column for text in texts for _, column in _parse(text)]
    return list(dict.fromkeys(column for column in columns if column is not None))


def check_template(template: Template, row: DataRow) -> None:
    """Raise `DataError` if the template names a column that the row does not have."""
    for column in template_columns(template):
        if column not in row:
            near = get_close_matches(column, list(row), n=1)
            hint = f" Did you mean {{{near[0]}}}?" if near else ""
            raise DataError(
                f"the prompt template names the column {{{column}}}, but the columns of the rows "
                f"are {list(row)}.{hint}"
            )


def _fill_text(template: str, row: DataRow) -> str:
    return "".join(
        text + ("" if column is None else _to_text(column, row))
        for text, column in _parse(template)
    )


def _to_text(column: str, row: DataRow) -> str:
    check_template(f"{{{column}}}", row)
    value = row[column]
    if not isinstance(value, str | int | float):
        raise DataError(
            f"column {column!r} holds {value!r:.60} ({type(value).__name__}); a prompt template "
            "takes strings and numbers only"
        )
    return str(value)


def _parse(template: str) -> list[tuple[str, str | None]]:
    """Return pairs of literal text and the column whose value follows the text, if any."""
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise DataError(
            f"the prompt template {template!r} cannot be read: {error}. Write columns in braces, "
            "{column}, and a literal brace twice, {{ or }}"
        ) from error
    for _, column, form, conversion in parsed:
        if column is not None and (form or conversion or not column or set(column) & set(".[]")):
            raise DataError(
                f"the prompt template {template!r} has more than a column name in its braces; "
                "expected {column} alone, without attributes, indices, formats or conversions"
            )
    return [(text, column) for text, column, _, _ in parsed]
