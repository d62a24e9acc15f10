"""What to type after `textpolicy check` has sampled from a model."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from textpolicy.cli.timed_sampler import TimedSampler
from textpolicy.config import TrainConfig, changed, settings_of
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
    signal: SignalCheck, config: TrainConfig, sampler: TimedSampler, *, has_gold: bool
) -> Advice:
    """Return what to do with a task for which the model earns these rewards."""
    if signal.verdict == "good":
        return Advice("Train on it", _line("train", config))
    if signal.verdict == "too easy":
        return Advice("Take harder rows, or choose another task of the list", "textpolicy envs")
    if signal.verdict == "answers cut off" and sampler.cut_at < sampler.max_tokens:
        longer = ["--seconds", f"{_MORE_TOKENS * sampler.seconds:g}"]
        return Advice("Give the check more time", _check_line(config, sampler, *longer))
    if signal.verdict == "answers cut off":
        tokens = {"sampling.max_tokens": _MORE_TOKENS * sampler.max_tokens}
        return Advice("Allow longer answers", _check_line(changed(config, tokens), sampler))
    if has_gold and not config.task.few_shot:
        shots = changed(config, {"task.few_shot": _EXAMPLES})
        return Advice("Show the model solved tasks", _check_line(shots, sampler))
    return Advice(
        "Take easier rows, give part of the reward to answers that are partly right, or choose "
        "another task of the list",
        "textpolicy envs",
    )


def _check_line(config: TrainConfig, sampler: TimedSampler, *more: str) -> str:
    return _line("check", config, "--sample", str(sampler.count), *more)


def _line(command: str, config: TrainConfig, *more: str) -> str:
    """Return the command line with all settings of the config that are not the defaults."""
    words = ["textpolicy", command]
    for mine, default in zip(settings_of(config), settings_of(TrainConfig()), strict=True):
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
