"""Configs as TOML: reading the file that a person writes, and writing the one of a run."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, time
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from textpolicy.config.settings import Setting, changed, sections_of, settings_of
from textpolicy.errors import ConfigError, UnreadableError
from textpolicy.untrusted.bounds import MAX_TOML_BYTES
from textpolicy.untrusted.parsing import parse_toml, read_toml_file

_C = TypeVar("_C")


def to_toml(config: Any, *, only_changed: bool = False) -> str:
    """Return a config as TOML; a comment says what happens for each unset setting.

    With `only_changed`, return only the settings that differ from their defaults.
    """
    lines: list[str] = []
    section = ""
    defaults = {one.key: one.default for one in settings_of(type(config)())}
    for setting in settings_of(config):
        if only_changed and setting.default == defaults[setting.key]:
            continue
        if setting.section != section:
            section = setting.section
            about = [] if only_changed else [f"# {sections_of(config)[section]}"]
            lines += ["", *about, f"[{section}]"]
        if setting.default is None:
            lines.append(f"# {setting.name}: {setting.option.unset}")
        else:
            lines.append(f"{setting.name} = {_value(setting.default)}")
    return "\n".join(lines).lstrip("\n") + "\n"


def check_can_be_read_back(config: Any) -> None:
    """Raise ConfigError if the config as TOML is too large, too deep or too long in a line to read.

    A run with such a config could not be resumed.
    """
    text = to_toml(config)
    problem, size = "", len(text.encode())
    if size > MAX_TOML_BYTES:
        problem = f"it has {size:,} bytes, and at most {MAX_TOML_BYTES:,} are read"
    else:
        try:
            parse_toml(text)
        except ValueError as error:
            problem = str(error)
    if problem:
        given = [one for one in settings_of(config) if one.default is not None]
        longest = max(given, key=lambda one: len(_value(one.default)))
        raise ConfigError(
            f"the config could not be read back from its file, so the run could not be resumed: "
            f"{problem}. The longest setting is {longest.key}. Shorten it"
        )


def read_toml(path: Path, defaults: _C) -> _C:
    """Return `defaults` changed by the file; one error lists all that is wrong in it."""
    try:
        content = read_toml_file(path)
    except UnreadableError as error:
        raise ConfigError(f"the config cannot be used: {error}") from error
    return config_from(content, defaults, str(path))


def config_from(content: Mapping[str, Any], defaults: _C, origin: str) -> _C:
    """Return `defaults` changed by sections of settings; one error lists all that is wrong."""
    found = _Reading.of(content, settings_of(defaults))
    if found.problems:
        raise ConfigError("\n  ".join([f"{origin} cannot be used:", *found.problems]))
    try:
        return changed(defaults, found.values)
    except ConfigError as error:
        raise ConfigError(f"{origin} cannot be used: {error}") from error


NAMES_IN_OTHER_LIBRARIES = {
    "learning_rate": ("lr",),
    "num_generations": ("group_size",),
    "num_iterations": ("epochs",),
    "num_train_epochs": ("steps", "epochs"),
    "max_steps": ("steps", "iterations"),
    "iters": ("iterations", "steps"),
    "save_steps": ("checkpoint_every",),
    "save_every": ("checkpoint_every",),
    "eval_steps": ("evaluation.every", "eval_every"),
    "steps_per_eval": ("evaluation.every", "eval_every"),
    "logging_steps": ("steps_per_report",),
    "loss_type": ("algorithm.name",),
    "lr_scheduler_type": ("schedule",),
    "reward_funcs": ("reward",),
    "output_dir": ("output",),
    "per_device_train_batch_size": ("batch_size",),
    "gradient_accumulation_steps": ("accumulation",),
    "gradient_checkpointing": ("checkpoint_gradients",),
    "max_completion_length": ("max_tokens",),
    "max_new_tokens": ("max_tokens",),
    "max_seq_length": ("max_length",),
    "base_model": ("model.name",),
    "model_name_or_path": ("model.name",),
    "dataset": ("data", "data.source"),
    "dataset_name": ("data", "data.source"),
    "lora_r": ("rank",),
    "lora_rank": ("rank",),
    "lora_dropout": ("dropout",),
    "lora_alpha": ("alpha",),
    "warmup_steps": ("warmup",),
    "report_to": ("wandb",),
    "enable_thinking": ("thinking",),
    "system_prompt": ("system",),
}
"""Names of settings in other libraries, and ours: the last part of the key, or all of it.

Of several names the first one counts that the command has.
"""
# TRL counts the completions of an update. Here an update is a number of groups.
_GROUPS_OF_AN_UPDATE = (
    "rollout.groups_per_step (--groups-per-step) is per_device_train_batch_size times "
    "gradient_accumulation_steps, divided by num_generations; trainer.micro_batch_size "
    "(--micro-batch-size) changes the memory and not the update"
)
WAYS_BESIDE_SETTINGS = {
    "per_device_train_batch_size": _GROUPS_OF_AN_UPDATE,
    "gradient_accumulation_steps": _GROUPS_OF_AN_UPDATE,
    "reward_weights": "the weights are in the file of the reward: "
    "rewards = tp.Rewards([one, other], weights=[1.0, 0.5])",
    "logging_steps": "every step is logged; leave it out",
}
"""What does here what a setting of another library does there."""


def suggestion_for(key: str, known: list[str]) -> str:
    """Return "; did you mean ...?" for an unknown key, or an empty text if no key is similar.

    The same name in another section is preferred to names with a similar spelling.
    """
    section, _, word = key.rpartition(".")
    names = NAMES_IN_OTHER_LIBRARIES.get(word, (word,))
    alike: list[str] = []
    # What held-out tasks have beside the training tasks is named beside these.
    beside = (f"eval_{word}",) if section == "evaluation" else ()
    for name in (*beside, *names):
        alike = alike or [one for one in known if name in (one, one.rpartition(".")[2])]
    if not alike and (way := WAYS_BESIDE_SETTINGS.get(word)):
        return f"; {way}"
    if not alike:
        words = {other.rpartition(".")[2]: other for other in reversed(known)}
        alike = get_close_matches(key, known, n=1, cutoff=0.75)
        alike = alike or [words[near] for near in get_close_matches(names[0], words, n=1)]
    return f"; did you mean {' or '.join(alike)}?" if alike else ""


@dataclass(frozen=True)
class _Reading:
    """The valid values of a file by key, and the problems of the others."""

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
                reading._take(known[key], value)
            else:
                reading.problems.append(f"{key} is not a setting{suggestion_for(key, list(known))}")
        return reading

    def _take(self, setting: Setting, value: Any) -> None:
        try:
            self.values[setting.key] = setting.understand(value)
        except ConfigError as error:
            self.problems.append(f"{setting.key} is {error}")


def _flat(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield values by "section.name"; values outside a section, and empty sections, by name."""
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
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        inside = ", ".join(f"{_key(name)} = {_value(part)}" for name, part in value.items())
        return f"{{{inside}}}"
    return _quoted(str(value))


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _quoted(name)


def _quoted(text: str) -> str:
    # TOML reads the escapes of JSON, but must escape one control character that JSON does not.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
