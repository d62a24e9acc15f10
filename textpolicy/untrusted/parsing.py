"""The only readers of JSON and TOML: they bound the depth, and every failure is a ValueError."""

import json
import math
import re
import tomllib
from pathlib import Path
from typing import Any

from textpolicy.errors import UnreadableError
from textpolicy.untrusted.bounds import MAX_CONFIG_BYTES, MAX_DEPTH, MAX_TOML_BYTES
from textpolicy.untrusted.files import read_utf8, shown_path


def parse_json(text: str | bytes, *, constants: bool = False) -> Any:
    """Return the value of a JSON text. Raise ValueError if it is no JSON or nested too deep.

    `constants` allows NaN and Infinity, which are not JSON, but which some model configs have.
    """
    try:
        if constants:
            value = json.loads(text)
        else:
            value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    opening = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    if sum(text.count(mark) for mark in opening) > MAX_DEPTH:  # pyright: ignore[reportArgumentType]
        _check_depth(value)
    return value


def parse_toml(text: str) -> dict[str, Any]:
    """Return the tables of a TOML text. Raise ValueError if it is no TOML or nested too deep."""
    # Dotted keys nest without brackets, and tomllib takes quadratic time for very long ones.
    longest = max((line.count(".") for line in text.splitlines()), default=0)
    if longest > _MAX_DOTS:
        raise ValueError(f"a line has {longest:,} dots; expected at most {_MAX_DOTS:,}")
    try:
        value = tomllib.loads(text)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    _check_depth(value)
    return value


def read_json_file(path: Path, *, limit: int = MAX_CONFIG_BYTES, constants: bool = False) -> Any:
    """Return the value of a JSON file. Raise `UnreadableError`, which names the path."""
    text = read_utf8(path, limit=limit)
    try:
        return parse_json(text, constants=constants)
    except ValueError as error:
        raise UnreadableError(f"{shown_path(path)} is not JSON: {error}") from error


def read_json_object(path: Path, *, constants: bool = False) -> dict[str, Any]:
    """Return the JSON object of a file. Raise `UnreadableError` if it holds anything else."""
    content = read_json_file(path, constants=constants)
    if not isinstance(content, dict):
        raise UnreadableError(
            f"{shown_path(path)} holds a {type(content).__name__}; expected a JSON object"
        )
    return content


def read_toml_file(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file. Raise `UnreadableError`, which names the path."""
    text = read_utf8(path, limit=MAX_TOML_BYTES)
    try:
        return parse_toml(text)
    except ValueError as error:
        hint = _toml_hint(text, str(error))
        raise UnreadableError(f"{shown_path(path)} is not TOML: {error}{hint}") from error


def _toml_hint(text: str, error: str) -> str:
    """Return how to write the value of the line at which reading ended, if it is a word."""
    place, lines = re.search(r"at line ([0-9]+)", error), text.splitlines()
    line = lines[int(place[1]) - 1] if place and int(place[1]) <= len(lines) else ""
    assigned = _WORD_ASSIGNED.fullmatch(line)
    if assigned is None:
        return ""
    name, value = assigned.groups()
    if value.lower() in ("none", "null"):
        return f". Leave out the line of {name} for no value"
    return f". Write {name} = {_TRUTHS.get(value.lower(), json.dumps(value))}"


_MAX_DOTS = 2000
_WORD_ASSIGNED = re.compile(r"""\s*([\w.-]{1,80})\s*=\s*([^\s"'[{#]{1,200})\s*(?:#.*)?""")
_TRUTHS = {
    "true": "true",
    "yes": "true",
    "on": "true",
    "false": "false",
    "no": "false",
    "off": "false",
}
_TOO_DEEP = f"it is nested more than {MAX_DEPTH} deep"


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise ValueError(f"{digits:.40} is larger than any number that can be computed with")
    return number


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [one for one in level if isinstance(one, dict | list)]
        if not level:
            return
        level = [part for one in level for part in (one.values() if isinstance(one, dict) else one)]
    raise ValueError(_TOO_DEEP)
