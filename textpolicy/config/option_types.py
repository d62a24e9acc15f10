"""What a text, or a value of a TOML file, becomes by the type of its field."""

import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

Table = Mapping[str, Any]
UNSET = "none"
"""What stands for no value on the command line; in a file the line is left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """How values of one type are read. Both functions raise `ValueError` for what is none."""

    words: str
    from_text: Callable[[str], Any]
    from_toml: Callable[[Any], Any]
    metavar: str


def from_text(annotation: Any, text: str) -> Any:
    """The value that a text of the command line means; of several types, the first that fits."""
    for kind in _kinds_of(annotation):
        try:
            return kind.from_text(text)
        except ValueError:
            continue
    raise ValueError(text)


def from_toml(annotation: Any, value: Any) -> Any:
    """The value that a TOML value means: whole numbers are numbers too, texts can be paths."""
    for kind in _kinds_of(annotation):
        try:
            return kind.from_toml(value)
        except ValueError:
            continue
    raise ValueError(value)


def words_of(annotation: Any) -> str:
    """What a value must be, for people."""
    return " or ".join(kind.words for kind in _kinds_of(annotation) if kind is not _NONE)


def metavar_of(annotation: Any) -> str:
    """What stands for a value in the help."""
    return "|".join(kind.metavar for kind in _kinds_of(annotation) if kind is not _NONE)


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, however deep."""
    if isinstance(annotation, UnionType) or get_origin(annotation) is Union:
        return tuple(chain.from_iterable(map(alternatives, get_args(annotation))))
    return (annotation,)


@cache
def _kinds_of(annotation: Any) -> list[Kind]:
    return [
        _choice(get_args(member)) if get_origin(member) is Literal else _KINDS[member]
        for member in sorted(alternatives(annotation), key=lambda member: member is not NoneType)
    ]


def _choice(values: tuple[str | int, ...]) -> Kind:
    by_text = {str(value): value for value in values}

    def from_text(text: str) -> Any:
        if text not in by_text:
            raise ValueError(text)
        return by_text[text]

    def from_toml(value: Any) -> Any:
        if type(value) not in (str, int) or value not in values:
            raise ValueError(value)
        return value

    return Kind(
        words=f"one of {', '.join(by_text)}",
        from_text=from_text,
        from_toml=from_toml,
        metavar="|".join(by_text),
    )


def _exactly(*types: type) -> Callable[[Any], Any]:
    """Values of these types as they are; `True` is no number here."""

    def check(value: Any) -> Any:
        if type(value) not in types:
            raise ValueError(value)
        return value

    return check


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"


def _number(value: str | float) -> float:
    number = float(value)
    if math.isnan(number):
        raise ValueError(value)
    return number


def _text(value: Any) -> str:
    # A lone surrogate, from a file name in another encoding, cannot be written down again.
    return _exactly(str)(value).encode().decode()


def _path(value: Any) -> Path:
    return value if isinstance(value, Path) else Path(_text(value))


def _nothing(value: Any) -> None:
    if value not in (None, UNSET):
        raise ValueError(value)


def _names(value: Any) -> tuple[str, ...]:
    return tuple(_text(name) for name in _exactly(list, tuple)(value))


def _table(text: str) -> Table:
    return _exactly(dict)(tomllib.loads(f"table = {text}")["table"])


_NONE = Kind(words="none", from_text=_nothing, from_toml=_exactly(NoneType), metavar="none")
_KINDS: dict[Any, Kind] = {
    NoneType: _NONE,
    bool: Kind(words="true or false", from_text=_truth, from_toml=_exactly(bool), metavar="BOOL"),
    int: Kind(words="a whole number", from_text=int, from_toml=_exactly(int), metavar="N"),
    float: Kind(
        words="a number",
        from_text=_number,
        from_toml=lambda value: _number(_exactly(int, float)(value)),
        metavar="X",
    ),
    str: Kind(words="text", from_text=_text, from_toml=_text, metavar="TEXT"),
    Path: Kind(words="a path", from_text=_path, from_toml=_path, metavar="PATH"),
    tuple[str, ...]: Kind(
        words="a list of texts",
        # Commas inside brackets belong to one text: mask_tokens(low=0.5, high=5.0).
        from_text=lambda text: _names(re.split(r",(?![^()]*\))", text)),
        from_toml=_names,
        metavar="TEXT,...",
    ),
    Table: Kind(
        words="a table",
        from_text=_table,
        from_toml=_exactly(dict),
        metavar="TABLE",
    ),
}
