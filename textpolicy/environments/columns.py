"""Renames and digs out columns of rows, so that data of any layout has the names a task needs."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from textpolicy.errors import DataError

_MISSING = object()
_LONGEST_NAME = 200
_SHOWN_NAMES = 20
ColumnNames = Mapping[str, Any]
"""New names of columns to the columns that they stand for, such as {"gold": "extra.answer"}."""


def check_columns(columns: ColumnNames) -> None:
    """Raise `DataError` if a value is not the name of a column."""
    wrong = [f"{new}={value!r:.60}" for new, value in columns.items() if not _is_name(value)]
    if wrong:
        raise DataError(
            f"columns has {', '.join(wrong)}; expected NAME=COLUMN with the name of a column of "
            "the rows, such as prompt=question, or gold=reward_model.ground_truth for a value "
            "inside of a column"
        )


def with_columns(row: Mapping[str, Any], columns: ColumnNames, where: str) -> Mapping[str, Any]:
    """Return the row with the columns under their new names as well.

    A dot goes into a column: "a.b" is the key "b" of the column "a", and "a.0" is its first entry,
    unless a column has the whole name.
    """
    if not columns:
        return row
    return {**row, **{new: _value(row, name, where) for new, name in columns.items()}}


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _LONGEST_NAME


def _value(row: Mapping[str, Any], name: str, where: str) -> Any:
    if name in row:
        return row[name]
    value: Any = row
    for step in name.split("."):
        known = value
        value = _step(known, step)
        if value is _MISSING:
            raise DataError(f"{where}: there is no column {name!r}: {_found(known, step)}")
    return value


def _step(value: Any, step: str) -> Any:
    if isinstance(value, Mapping):
        return value.get(step, _MISSING)
    if isinstance(value, list) and step.isdecimal() and len(step) < 10:
        return value[int(step)] if int(step) < len(value) else _MISSING
    return _MISSING


def _found(value: Any, step: str) -> str:
    if isinstance(value, Mapping):
        names = [str(name) for name in value]
        near = get_close_matches(step, names, n=1)
        hint = f". Did you mean {near[0]!r}?" if near else ""
        shown = ", ".join(names[:_SHOWN_NAMES])
        return f"{step!r} is not one of {shown or 'no columns'}{hint}"
    if isinstance(value, list):
        return f"{step!r} is no entry of a list of {len(value)}"
    return f"{step!r} is looked for in {value!r:.60} ({type(value).__name__}), which has no parts"
