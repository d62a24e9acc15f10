"""What to type after `textpolicy check` has sampled from a model."""

import shlex
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from textpolicy.cli.parser import CHECK_SECONDS, CHECKED
from textpolicy.cli.timed_sampler import TimedSampler
from textpolicy.cli.typed_flags import flag_words, short_path, text_of
from textpolicy.config import TrainConfig, changed, read_toml, settings_of
from textpolicy.config.settings import ByModel
from textpolicy.rewards.signal_check import MANY_CUT, SignalCheck
from textpolicy.runs.named_adapter import run_of_adapter

_EXAMPLES = 4
_MORE_TOKENS = 4
# A model that does not end within these tokens hardly ends within more of them.
_MANY_TOKENS = 2048
_SAMPLES = 8
_ENVS = "textpolicy envs"
_DEMONSTRATED = (
    "task.data",
    "task.columns",
    "task.prompt",
    "task.system",
    "task.gold_column",
    "model.name",
)
_EASIER = "take easier rows, or give part of the reward to answers that are partly right"


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
    gold_column: str | None = None,
    options: Namespace,
) -> Advice:
    """Return what to do with a task for which the model earns these rewards.

    `options` are those of the check. The command carries all of them that it takes.
    """
    if signal.verdict == "good":
        return Advice("Train on it", _line(["train"], config, options))
    if signal.verdict == "too easy":
        return Advice("Take harder rows, or choose another task of the list", _ENVS)
    if signal.verdict == "answers cut off" and sampler.cut_at < sampler.max_tokens:
        sentence = (
            f"The check itself has cut the answers at {sampler.cut_at} of {sampler.max_tokens} "
            f"tokens, to end in {sampler.seconds:g} s. Give it more time"
        )
        longer = _check_line(config, options, seconds=_MORE_TOKENS * sampler.seconds)
        return Advice(sentence, longer)
    ends_late = sampler.max_tokens * _MORE_TOKENS <= _MANY_TOKENS and not config.task.few_shot
    if signal.verdict == "answers cut off" and ends_late:
        tokens = {"sampling.max_tokens": _MORE_TOKENS * sampler.max_tokens}
        return Advice("Allow longer answers", _check_line(changed(config, tokens), options))
    if config.adapter.start is not None:
        return _after_training(config.adapter.start)
    if has_gold and not config.task.few_shot:
        shots = changed(config, {"task.few_shot": _EXAMPLES})
        return Advice("Show the model solved tasks", _check_line(shots, options))
    first = "The model does not end its answers" if signal.cut > MANY_CUT else "Few groups differ"
    if has_gold and config.task.data:
        return Advice(
            f"{first}. Show the model demonstrations first, {_EASIER}. These rows have the right "
            "answers, which are demonstrations",
            _demonstrations(config, gold_column),
        )
    return Advice(
        f"{first}. Show the model demonstrations first (textpolicy sft), {_EASIER}, or choose "
        "another task of the list",
        _ENVS,
    )


def how_to_sample(config: TrainConfig, options: Namespace) -> Advice:
    """Return how to see what a model earns, after a check that has sampled nothing."""
    given = Namespace(**vars(options) | {"sample": _SAMPLES})
    return Advice(
        "See what a model earns, from answers that it samples", _check_line(config, given)
    )


def _after_training(adapter: Path) -> Advice:
    """Return what to do with an adapter that does not earn enough: its training goes on."""
    run = run_of_adapter(adapter)
    settings = run.read_settings() if run else {}
    length = settings.get("trainer", {})
    name = next((name for name in ("iterations", "epochs") if length.get(name)), None)
    if run is None or "data" not in settings or name is None:
        return Advice(f"The adapter has not learned this task. {_EASIER.capitalize()}", _ENVS)
    longer = ["sft", "--resume", short_path(run.path), f"--{name}", str(2 * int(length[name]))]
    return Advice(
        f"Supervised training made this adapter in {length[name]} {name}. Train it longer, "
        f"{_EASIER}",
        shlex.join(["textpolicy", *longer]),
    )


def _demonstrations(config: TrainConfig, gold_column: str | None) -> str:
    """Return the command line of supervised training on the right answers of these rows."""
    learned = changed(config, {"task.gold_column": gold_column})
    words = [
        word
        for one, usual in zip(settings_of(learned), settings_of(TrainConfig()), strict=True)
        if one.key in _DEMONSTRATED and one.default != usual.default
        for word in flag_words(one)
    ]
    return shlex.join(["textpolicy", "sft", *words])


def _check_line(config: TrainConfig, options: Namespace, seconds: float | None = None) -> str:
    """Return the command line of another check, as long and of as many rows."""
    seconds = seconds or options.seconds
    reward = config.task.reward
    # A reward after a table would be read as one of its entries.
    words = ["check", reward] if reward and reward != _begun(options).task.reward else ["check"]
    more = ["--rows", str(options.rows)] if options.rows else []
    more += ["--sample", str(options.sample)]
    more += ["--seconds", f"{seconds:g}"] if seconds != CHECK_SECONDS else []
    return _line(words, config, options, *more)


def _line(words: list[str], config: TrainConfig, options: Namespace, *more: str) -> str:
    """Return the command line with all settings that are neither the file's nor the defaults."""
    file = options.config
    line = ["textpolicy", *words, *(["--config", short_path(file)] if file else [])]
    for mine, default in zip(settings_of(config), settings_of(_begun(options)), strict=True):
        if mine.default == default.default or isinstance(mine.default, ByModel):
            continue
        if words[0] == "train" or mine.key in CHECKED:
            line += flag_words(mine)
        elif mine.key != "task.reward":
            line += ["--set", f"{mine.key}={text_of(mine.default)}"]
    return shlex.join([*line, *more])


def _begun(options: Namespace) -> TrainConfig:
    """Return the config that the flags of a line change: that of the file, or the defaults."""
    return read_toml(options.config, TrainConfig()) if options.config else TrainConfig()
