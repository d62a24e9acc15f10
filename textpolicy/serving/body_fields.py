"""Reads the fields of a request's body, each with a check, and refuses what nobody has read."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from textpolicy.serving.refusal import RefusalError

Allowed = tuple[tuple[type, ...], Callable[[Any], bool], str]
"""The types of a field, a test of its value, and a description of allowed values."""


def whole_number(low: int, high: int) -> Allowed:
    """Return what allows whole numbers from `low` to `high`."""
    return (int,), lambda x: low <= x <= high, f"a whole number from {low} to {high}"


def number(low: float, high: float) -> Allowed:
    """Return what allows numbers from `low` to `high`."""
    return (int, float), lambda x: low <= x <= high, f"a number from {low:g} to {high:g}"


BOOL: Allowed = ((bool,), lambda x: True, "true or false")


def is_text(value: Any) -> bool:
    """Return whether a value is a text that can be written as UTF-8."""
    if not isinstance(value, str):
        return False
    # A lone half of a surrogate pair is valid in JSON, and no text.
    return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)


class BodyFields:
    """The fields of one JSON object. A field that is null counts as not given."""

    def __init__(self, values: Any, where: str = "the body") -> None:
        if not isinstance(values, dict):
            raise RefusalError(
                f"{where} is a {type(values).__name__}; expected a JSON object", code="invalid_type"
            )
        self._values: Mapping[str, Any] = values
        self._read: set[str] = set()

    def raw(self, name: str) -> Any:
        """Return the value of a field as it is, or None."""
        self._read.add(name)
        return self._values.get(name)

    def take(self, name: str, allowed: Allowed, default: Any = None) -> Any:
        """Return the value of a field, or the default. Refuse a value that is not allowed."""
        value = self.raw(name)
        if value is None:
            return default
        kinds, holds, expected = allowed
        # True is an int to Python.
        right = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if not right or not holds(value):
            raise wrong_value(name, value, expected)
        return value

    def required_text(self, name: str) -> str:
        """Return the text of a field that must be given."""
        value = self.raw(name)
        if not is_text(value) or not value:
            raise wrong_value(name, value, "a text, and it must be given")
        return value

    def ignore(self, *names: str) -> None:
        """Accept fields that say nothing about the answer, whatever they hold."""
        self._read.update(names)

    def refuse_unless(self, allowed_values: Mapping[str, tuple[Any, ...]], why: str) -> None:
        """Refuse fields with any other value than those that ask for what happens anyway."""
        for name, allowed in allowed_values.items():
            value = self.raw(name)
            if value is not None and value not in allowed:
                raise RefusalError(
                    f"{name} is {_shown(value)}; {why}. Leave the parameter out, or give "
                    f"{' or '.join(map(repr, allowed))}",
                    param=name,
                    code="unsupported_parameter",
                )

    def finish(self) -> None:
        """Refuse the fields that nobody has read."""
        unknown = [n for n, v in self._values.items() if n not in self._read and v is not None]
        if unknown:
            name = unknown[0]
            near = get_close_matches(name, self._read, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {sorted(self._read)}"
            raise RefusalError(
                f"the parameter {name!r:.80} is not known here, so it cannot be honoured. {hint}",
                param=name[:80],
                code="unknown_parameter",
            )


def wrong_value(name: str, value: Any, expected: str) -> RefusalError:
    """Return the refusal of a field's value."""
    found = "missing" if value is None else _shown(value)
    return RefusalError(f"{name} is {found}; expected {expected}", param=name, code="invalid_value")


def _shown(value: Any) -> str:
    # The repr of a huge value would be built only to be cut off.
    if isinstance(value, dict | list):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value[:60] if isinstance(value, str) else value)[:80]
