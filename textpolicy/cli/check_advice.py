"""What to type after `textpolicy check` has sampled from a model."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textpolicy.cli.next_commands import short_path
from textpolicy.cli.timed_sampler import TimedSampler
from textpolicy.config import TrainConfig, changed, read_toml, settings_of
from textpolicy.config.settings import ByModel
from textpolicy.rewards.signal_check import SignalCheck

_EXAMPLES = 4
_MORE_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Advice:
    """A sentence about what to do next, and its command line."""

    sentence: str
    command: str

    def __str__(self) -> str:
        return f"{self.sentence}:\n  {self.command}"


def next_after_check(
    signal: SignalCheck,
    config: TrainConfig,
    sampler: TimedSampler,
    *,
    has_gold: bool,
    file: Path | None,
) -> Advice:
    """Return what to do with a task for which the model earns these rewards.

    `file` is the TOML file that `config` was read from, if there is one.
    """
    if signal.verdict == "good":
        return Advice("Train on it", _line("train", config, file))
    if signal.verdict == "too easy":
        return Advice("Take harder rows, or choose another task of the list", "textpolicy envs")
    if signal.verdict == "answers cut off" and sampler.cut_at < sampler.max_tokens:
        longer = ["--seconds", f"{_MORE_TOKENS * sampler.seconds:g}"]
        sentence = (
            f"The check itself has cut the answers at {sampler.cut_at} of {sampler.max_tokens} "
            f"tokens, to end in {sampler.seconds:g} s. Give it more time"
        )
        return Advice(sentence, _check_line(config, sampler, file, *longer))
    if signal.verdict == "answers cut off":
        tokens = {"sampling.max_tokens": _MORE_TOKENS * sampler.max_tokens}
        return Advice("Allow longer answers", _check_line(changed(config, tokens), sampler, file))
    if has_gold and not config.task.few_shot:
        shots = changed(config, {"task.few_shot": _EXAMPLES})
        return Advice("Show the model solved tasks", _check_line(shots, sampler, file))
    return Advice(
        "Take easier rows, give part of the reward to answers that are partly right, or choose "
        "another task of the list",
        "textpolicy envs",
    )


def _check_line(config: TrainConfig, sampler: TimedSampler, file: Path | None, *more: str) -> str:
    return _line("check", config, file, "--sample", str(sampler.count), *more)


def _line(command: str, config: TrainConfig, file: Path | None, *more: str) -> str:
    """Return the command line with all settings that are neither the file's nor the defaults."""
    words = ["textpolicy", command, *(["--config", short_path(file)] if file else [])]
    begun = read_toml(file, TrainConfig()) if file else TrainConfig()
    for mine, default in zip(settings_of(config), settings_of(begun), strict=True):
        if mine.default == default.default or isinstance(mine.default, ByModel):
            continue
        value = [] if mine.default is True else [_text(mine.default)]
        # The reward has no flag in this command.
        named = command == "check" and mine.key == "task.reward"
        words += value if named else [mine.flag, *value]
    return shlex.join([*words, *more])


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{name}={_text(one)}" for name, one in value.items())
    return value if isinstance(value, str) else json.dumps(value)
