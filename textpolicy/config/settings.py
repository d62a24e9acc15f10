"""One option of a command: its field says everything, and everything else is derived from it.

A config is a frozen dataclass whose fields are made by `option`, or sections that are such
dataclasses themselves. Help, flags, files, checks and documentation all read `settings_of`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from types import NoneType
from typing import Any, TypeVar

from textpolicy.config.option_types import alternatives, from_text, from_toml, metavar_of, words_of
from textpolicy.errors import ConfigError

C = TypeVar("C")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """What a value must satisfy beside its type, and how that is said after the type's words."""

    holds: Callable[[Any], bool]
    words: str


FINITE = Limit(holds=math.isfinite, words="")


def at_least(low: float) -> Limit:
    """Finite numbers from `low` on."""
    return Limit(holds=lambda x: low <= x < math.inf, words=f", at least {low}")


def above(low: float, *, infinite: bool = False) -> Limit:
    """Numbers greater than `low`."""
    return Limit(holds=lambda x: x > low and (infinite or x < math.inf), words=f" above {low}")


# What a random key of mlx is made from.
SEED = Limit(holds=lambda x: 0 <= x < 2**64, words=" from 0 to 2^64 - 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """What a field says of itself beside its name, type and default.

    `unset` tells what happens where the default is None. `flag` is the field's name unless said
    otherwise; a `positional` one has none. An option that is given takes the place of `instead_of`,
    another of its section, where that was given before.
    """

    help: str
    unset: str = "none"
    flag: str | None = None
    metavar: str | None = None
    limit: Limit | None = None
    positional: bool = False
    instead_of: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """An option in its place: `key` is "trainer.lr", or "prompt" in a config without sections."""

    key: str
    annotation: Any
    default: Any
    option: Option

    @property
    def section(self) -> str:
        """The part of the key before the dot."""
        return self.key.rpartition(".")[0]

    @property
    def name(self) -> str:
        """The field."""
        return self.key.rpartition(".")[2]

    @property
    def flag(self) -> str:
        """How the command line calls it."""
        return self.option.flag or f"--{self.name.replace('_', '-')}"

    @property
    def metavar(self) -> str:
        """What stands for its value in the help."""
        return self.option.metavar or metavar_of(self.annotation)

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        return words_of(self.annotation) + (self.option.limit.words if self.option.limit else "")

    @property
    def optional(self) -> bool:
        """Whether it may be left unset."""
        return NoneType in alternatives(self.annotation)

    @property
    def shown_default(self) -> str:
        """The default, for people."""
        return self.option.unset if self.default is None else shown(self.default)

    def parse(self, text: str) -> Any:
        """The value that a text of the command line means."""
        return self._checked(from_text, text)

    def accept(self, value: Any) -> Any:
        """The value that a value of a file, or of a program, means."""
        return self._checked(from_toml, value)

    def _checked(self, read: Callable[[Any, Any], Any], given: Any) -> Any:
        try:
            value = read(self.annotation, given)
        except ValueError as error:
            raise ConfigError(f"{given!r}; expected {self.expected}") from error
        limit = self.option.limit
        # Words beside a number, such as "fail", are not measured by its limit.
        if limit and isinstance(value, int | float) and not limit.holds(value):
            raise ConfigError(f"{given!r}; expected {self.expected}")
        return value


def option(
    default: Any,
    help: str,
    *,
    unset: str = "none",
    flag: str | None = None,
    metavar: str | None = None,
    limit: Limit | None = None,
    positional: bool = False,
    instead_of: str | None = None,
) -> Any:
    """A field with its default and all that is known of it."""
    known = Option(
        help=help,
        unset=unset,
        flag=flag,
        metavar=metavar,
        limit=limit,
        positional=positional,
        instead_of=instead_of,
    )
    return field(default=default, metadata={"option": known})


def settings_of(config: Any) -> list[Setting]:
    """Every setting of a config (an instance, whose values are the defaults), sections in order."""
    return [
        Setting(
            key=key,
            annotation=known.type,
            default=value,
            option=known.metadata["option"],
        )
        for key, known, value in _walk(config)
    ]


def _walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for known in fields(config):
        value = getattr(config, known.name)
        if is_dataclass(value):
            yield from _walk(value, f"{known.name}.")
        else:
            yield prefix + known.name, known, value


def sections_of(config: Any) -> dict[str, str]:
    """What each section is about: the first line of its docstring."""
    return {
        known.name: (type(value).__doc__ or "").partition("\n")[0].rstrip(".")
        for known in fields(config)
        if is_dataclass(value := getattr(config, known.name))
    }


def check(section: Any) -> None:
    """Raise `ConfigError` for values that their fields do not allow; for `__post_init__`."""
    wrong: list[str] = []
    for setting in settings_of(section):
        try:
            setting.accept(setting.default)
        except ConfigError as error:
            wrong.append(f"{setting.key} is {error}")
    if wrong:
        raise ConfigError("\n".join(wrong))


def changed(config: C, values: Mapping[str, Any]) -> C:
    """The config with other values, by their keys."""
    whole = {key: value for key, value in values.items() if "." not in key}
    for section in dict.fromkeys(key.partition(".")[0] for key in values if "." in key):
        own = {
            key.partition(".")[2]: value
            for key, value in values.items()
            if key.startswith(f"{section}.")
        }
        before = getattr(config, section)
        try:
            whole[section] = replace(before, **(_replaced(before, own) | own))
        except ConfigError as error:
            raise ConfigError(f"[{section}] {error}") from error
    return replace(config, **whole)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _replaced(section: Any, own: Mapping[str, Any]) -> dict[str, None]:
    """What of a section gives way to its other values."""
    given = [one for one in settings_of(section) if own.get(one.name) is not None]
    return {one.option.instead_of: None for one in given if one.option.instead_of}


def shown(value: Any) -> str:
    """A value in the words of the command line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value)
