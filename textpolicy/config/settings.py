"""Options of a command, each declared once as a field of a config.

A config is a frozen dataclass. Its fields are made by `option`, or are sections, which are such
dataclasses too. Help, flags, TOML files, checks and documentation all read `settings_of`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from types import NoneType
from typing import Any, TypeVar

from textpolicy.config.option_types import alternatives, from_text, from_toml, metavar_of, words_of
from textpolicy.errors import ConfigError

_C = TypeVar("_C")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """A condition on a value beside its type; `words` say it after the words of the type."""

    holds: Callable[[Any], bool]
    words: str


FINITE = Limit(holds=math.isfinite, words="")


def at_least(low: float) -> Limit:
    """Return the limit for finite numbers that are not below `low`."""
    return Limit(holds=lambda x: low <= x < math.inf, words=f", at least {low}")


def above(low: float, *, infinite: bool = False) -> Limit:
    """Return the limit for numbers greater than `low`."""
    return Limit(holds=lambda x: x > low and (infinite or x < math.inf), words=f" above {low}")


class ByModel:
    """A default that holds for small models; `config/model_defaults.py` has those of others."""


class IntByModel(int, ByModel):
    """A whole number that was not set, and that the size of the model decides."""


class FloatByModel(float, ByModel):
    """A number that was not set, and that the size of the model decides."""


# mlx makes a random key from a seed of 64 bits.
SEED = Limit(holds=lambda x: 0 <= x < 2**64, words=" from 0 to 2^64 - 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """What a field declares beside its name, type and default.

    `unset` says in words what None means. `flag` replaces the flag made from the field's name; a
    `positional` option has no flag. An option that is given replaces `instead_of`, another option
    of its section, if that was given before.
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
    """An option of a config: `key` is "trainer.lr", or "prompt" in a config without sections."""

    key: str
    annotation: Any
    default: Any
    option: Option

    @property
    def section(self) -> str:
        """Return the part of the key before the dot."""
        return self.key.rpartition(".")[0]

    @property
    def name(self) -> str:
        """Return the name of the field."""
        return self.key.rpartition(".")[2]

    @property
    def flag(self) -> str:
        """Return the flag on the command line."""
        return self.option.flag or f"--{self.name.replace('_', '-')}"

    @property
    def metavar(self) -> str:
        """Return the placeholder of the value in the help."""
        return self.option.metavar or metavar_of(self.annotation)

    @property
    def expected(self) -> str:
        """Return in words what a value must be."""
        return words_of(self.annotation) + (self.option.limit.words if self.option.limit else "")

    @property
    def optional(self) -> bool:
        """Return whether the value may be None."""
        return NoneType in alternatives(self.annotation)

    @property
    def shown_default(self) -> str:
        """Return the default in words."""
        if isinstance(self.default, ByModel):
            return f"by the model; {shown(self.default)} for a tiny one"
        return self.option.unset if self.default is None else shown(self.default)

    def parse(self, text: str) -> Any:
        """Return the value of command-line text; raise ConfigError if the text is not allowed."""
        return self._checked(from_text, text)

    def accept(self, value: Any) -> Any:
        """Return the value of a TOML or Python value; raise ConfigError if it is not allowed."""
        return self._checked(from_toml, value)

    def understand(self, value: Any) -> Any:
        """Return the value as `accept` does, or of a text or number that plainly means one.

        YAML reads 1e-4 as a text, TOML reads 1e3 as a fraction, and many a file has "yes" or 1 for
        true.
        """
        kinds = {*alternatives(self.annotation)}
        # One name, such as PEFT's "all-linear", is a list of one.
        if isinstance(value, str) and ({bool, str} <= kinds or tuple[str, ...] in kinds):
            return self.parse(value)
        try:
            return self.accept(value)
        except ConfigError:
            plain = {bool, int, float, NoneType}
            if type(value) not in (str, int, float) or not plain.issuperset(kinds):
                raise
            with suppress(ConfigError):
                return self.parse(str(value))
            raise

    def _checked(self, read: Callable[[Any, Any], Any], given: Any) -> Any:
        if isinstance(given, ByModel):
            return given
        try:
            value = read(self.annotation, given)
        except ValueError as error:
            raise ConfigError(f"{given!r}; expected {self.expected}") from error
        limit = self.option.limit
        # The limit is for numbers; an option may also take words, such as "fail".
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
    """Return a dataclass field with its default and its declaration as an option."""
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
    """Return every setting of a config in order; the values of the instance are the defaults."""
    return [
        Setting(key=key, annotation=known.type, default=value, option=known.metadata["option"])
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
    """Return what each section is about: the first line of its docstring."""
    return {
        known.name: (type(value).__doc__ or "").partition("\n")[0].rstrip(".")
        for known in fields(config)
        if is_dataclass(value := getattr(config, known.name))
    }


def check(section: Any) -> None:
    """Raise ConfigError with all values of a section that their fields do not allow."""
    wrong: list[str] = []
    for setting in settings_of(section):
        try:
            setting.accept(setting.default)
        except ConfigError as error:
            wrong.append(f"{setting.key} is {error}")
    if wrong:
        raise ConfigError("\n".join(wrong))


def changed(config: _C, values: Mapping[str, Any]) -> _C:
    """Return the config with other values, given by key."""
    whole = {key: value for key, value in values.items() if "." not in key}
    for section in dict.fromkeys(key.partition(".")[0] for key in values if "." in key):
        own = {
            key.partition(".")[2]: value
            for key, value in values.items()
            if key.startswith(f"{section}.")
        }
        before = getattr(config, section)
        try:
            whole[section] = replace(before, **(_options_given_up(before, own) | own))
        except ConfigError as error:
            raise ConfigError(f"[{section}] {error}") from error
    return replace(config, **whole)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _options_given_up(section: Any, own: Mapping[str, Any]) -> dict[str, None]:
    """Return the options of a section that the new values replace, set to None."""
    given = [one for one in settings_of(section) if own.get(one.name) is not None]
    return {one.option.instead_of: None for one in given if one.option.instead_of}


def shown(value: Any) -> str:
    """Return a value in the words of the command line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value)
