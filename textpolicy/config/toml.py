"""Configs as TOML: the file that a person writes, and the one that a run keeps."""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from textpolicy.config.settings import Setting, changed, sections_of, settings_of
from textpolicy.errors import ConfigError

C = TypeVar("C")


def to_toml(config: Any) -> str:
    """Every setting of a config; what is unset stands in a comment, with what that means."""
    lines: list[str] = []
    section = ""
    for setting in settings_of(config):
        if setting.section != section:
            section = setting.section
            lines += ["", f"# {sections_of(config)[section]}", f"[{section}]"]
        if setting.default is None:
            lines.append(f"# {setting.name}: {setting.option.unset}")
        else:
            lines.append(f"{setting.name} = {_value(setting.default)}")
    return "\n".join(lines).lstrip("\n") + "\n"


def read_toml(path: Path, defaults: C) -> C:
    """`defaults` with what the file says. All that is wrong with it is told at once."""
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    return config_from(content, defaults, str(path))


def config_from(content: Mapping[str, Any], defaults: C, origin: str) -> C:
    """Return `defaults` changed by sections of settings; one error lists all that is wrong."""
    found = _Reading.of(content, settings_of(defaults))
    if found.problems:
        raise ConfigError("\n  ".join([f"{origin} cannot be used:", *found.problems]))
    try:
        return changed(defaults, found.values)
    except ConfigError as error:
        raise ConfigError(f"{origin} cannot be used: {error}") from error


# What a person may know a setting by from elsewhere.
NAMES_ELSEWHERE = {
    "learning_rate": "lr",
    "num_generations": "group_size",
    "num_iterations": "epochs",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_checkpointing": "checkpoint_gradients",
    "max_completion_length": "max_tokens",
    "max_new_tokens": "max_tokens",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "report_to": "wandb",
}


def nearest(key: str, known: list[str]) -> str:
    """A question that ends a message about an unknown key, or nothing if none is like it.

    The same word in another section comes before words that are spelled alike.
    """
    word = key.rpartition(".")[2]
    word = NAMES_ELSEWHERE.get(word, word)
    alike = [other for other in known if other.rpartition(".")[2] == word]
    if not alike:
        words = {other.rpartition(".")[2]: other for other in reversed(known)}
        alike = get_close_matches(key, known, n=1, cutoff=0.75)
        alike = alike or [words[near] for near in get_close_matches(word, words, n=1)]
    return f"; did you mean {' or '.join(alike)}?" if alike else ""


@dataclass(frozen=True)
class _Reading:
    """What of a file could be used, by key, and what could not."""

    values: dict[str, Any]
    problems: list[str]

    @classmethod
    def of(cls, content: Mapping[str, Any], settings: list[Setting]) -> "_Reading":
        reading = cls({}, [])
        known = {setting.key: setting for setting in settings}
        sections = {setting.section for setting in settings}
        for key, value in _flat(content):
            if value == {} and key in sections:
                continue
            if key in known:
                reading._see(known[key], value)
            else:
                reading.problems.append(f"{key} is no setting{nearest(key, list(known))}")
        return reading

    def _see(self, setting: Setting, value: Any) -> None:
        try:
            self.values[setting.key] = setting.accept(value)
        except ConfigError as error:
            self.problems.append(f"{setting.key} is {error}")


def _flat(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Values by "section.name"; what is in no section, or an empty one, by its own name."""
    for name, value in content.items():
        if isinstance(value, dict) and value:
            yield from ((f"{name}.{inner}", part) for inner, part in value.items())
        else:
            yield name, value


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        inside = ", ".join(f"{_key(name)} = {_value(part)}" for name, part in value.items())
        return f"{{{inside}}}"
    return _quoted(str(value))


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _quoted(name)


def _quoted(text: str) -> str:
    # JSON's escapes are TOML's, but for the one control character that JSON leaves as it is.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
