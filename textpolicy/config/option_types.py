"""Reads values of options from command-line text and from TOML, by the type of the field."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from textpolicy.untrusted.parsing import parse_json, parse_toml

Table = Mapping[str, Any]
UNSET = "none"
"""The word for "no value" on the command line; a TOML file leaves the line out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptionType:
    """How values of one type are read. Both functions raise ValueError for other values."""

    words: str
    from_text: Callable[[str], Any]
    from_toml: Callable[[Any], Any]
    metavar: str


def from_text(annotation: Any, text: str) -> Any:
    """Return the value of command-line text; of several types, the first that fits is taken."""
    for option_type in _types_of(annotation):
        try:
            return option_type.from_text(text)
        except ValueError:
            continue
    raise ValueError(text)


def from_toml(annotation: Any, value: Any) -> Any:
    """Return the value of a TOML value; a whole number fits a number, and text fits a path."""
    for option_type in _types_of(annotation):
        try:
            return option_type.from_toml(value)
        except ValueError:
            continue
    raise ValueError(value)


def words_of(annotation: Any) -> str:
    """Return in words what a value must be."""
    return " or ".join(one.words for one in _types_of(annotation) if one is not _NONE)


def metavar_of(annotation: Any) -> str:
    """Return the placeholder of a value in the help."""
    return "|".join(one.metavar for one in _types_of(annotation) if one is not _NONE)


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, also of nested ones."""
    if isinstance(annotation, UnionType) or get_origin(annotation) is Union:
        return tuple(chain.from_iterable(map(alternatives, get_args(annotation))))
    return (annotation,)


@cache
def _types_of(annotation: Any) -> list[OptionType]:
    return [
        _choice(get_args(member)) if get_origin(member) is Literal else _TYPES[member]
        for member in sorted(alternatives(annotation), key=lambda member: member is not NoneType)
    ]


def _choice(values: tuple[str | int, ...]) -> OptionType:
    by_text = {str(value): value for value in values}

    def from_text(text: str) -> Any:
        if text not in by_text:
            raise ValueError(text)
        return by_text[text]

    def from_toml(value: Any) -> Any:
        if type(value) not in (str, int) or value not in values:
            raise ValueError(value)
        return value

    return OptionType(
        words=f"one of {', '.join(by_text)}",
        from_text=from_text,
        from_toml=from_toml,
        metavar="|".join(by_text),
    )


def _exactly(value: Any, *types: type) -> Any:
    """Return the value; raise ValueError if it has none of these types. True is not a number."""
    if type(value) not in types:
        raise ValueError(value)
    return value


_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def read_truth(text: str) -> bool:
    """Return the boolean that a word such as True, yes, on or 1 means, in any case."""
    word = text.strip().lower()
    if word not in _YES + _NO:
        raise ValueError(text)
    return word in _YES


def _whole(text: str) -> int:
    """Return the whole number of 1000, 10_000 or 1e3."""
    try:
        return int(text)
    except ValueError:
        number = _number(text)
        if not number.is_integer():
            raise
        return int(number)


def _number(value: str | float) -> float:
    try:
        number = float(value)
    except OverflowError as error:
        raise ValueError(value) from error
    if math.isnan(number):
        raise ValueError(value)
    return number


def _text(value: Any) -> str:
    # A lone surrogate, from a file name in another encoding, cannot be written as UTF-8.
    return _exactly(value, str).encode().decode()


def _path(value: Any) -> Path:
    path = value if isinstance(value, Path) else Path(_text(value))
    if "\0" in str(path):
        raise ValueError(value)
    return path


def _nothing(value: Any) -> None:
    if value is not None and str(value).lower() != UNSET:
        raise ValueError(value)


def _names(value: Any) -> tuple[str, ...]:
    return tuple(_text(name) for name in _exactly(value, list, tuple))


def _table(text: str) -> Table:
    """Return the table of {key = value}, of {"key": value} as in JSON, or of KEY=VALUE."""
    name, equals, value = text.partition("=")
    if equals and re.fullmatch(r"\s*[A-Za-z_]\w*\s*", name):
        return {name.strip(): _table_value(value)}
    try:
        return _exactly(parse_toml(f"table = {text}")["table"], dict)
    except ValueError:
        return _exactly(parse_json(text), dict)


def _table_value(text: str) -> Any:
    """Return the value of TOML, such as false, 3 or "a b", or else the text itself."""
    words = {"True": True, "False": False}
    try:
        return words[text] if text in words else parse_toml(f"value = {text}")["value"]
    except ValueError:
        return text


_NONE = OptionType(
    words="none",
    from_text=_nothing,
    from_toml=lambda value: _exactly(value, NoneType),
    metavar="none",
)
_TYPES: dict[Any, OptionType] = {
    NoneType: _NONE,
    bool: OptionType(
        words="true or false",
        from_text=read_truth,
        from_toml=lambda value: _exactly(value, bool),
        metavar="BOOL",
    ),
    int: OptionType(
        words="a whole number",
        from_text=_whole,
        from_toml=lambda value: _exactly(value, int),
        metavar="N",
    ),
    float: OptionType(
        words="a number",
        from_text=_number,
        from_toml=lambda value: _number(_exactly(value, int, float)),
        metavar="X",
    ),
    str: OptionType(words="text", from_text=_text, from_toml=_text, metavar="TEXT"),
    Path: OptionType(words="a path", from_text=_path, from_toml=_path, metavar="PATH"),
    tuple[str, ...]: OptionType(
        words="a list of texts",
        # Commas inside brackets belong to one text: mask_tokens(low=0.5, high=5.0).
        from_text=lambda text: _names(re.split(r",(?![^()]*\))", text)),
        from_toml=_names,
        metavar="TEXT,...",
    ),
    Table: OptionType(
        words="a table",
        from_text=_table,
        from_toml=lambda value: _exactly(value, dict),
        metavar="TABLE",
    ),
}
