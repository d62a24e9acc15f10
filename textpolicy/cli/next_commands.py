"""The commands that a person may type after a run, with the paths of the run filled in."""

import os
import shlex
from pathlib import Path

from textpolicy.cli.answer import table
from textpolicy.cli.typed_flags import flag_words, short_path
from textpolicy.config import SFTConfig, TrainConfig, changed, settings_of
from textpolicy.experiment import RunResult
from textpolicy.experiment.assembly import RunConfig

_MODEL = ("model.name", "model.dtype", "model.allow_special_tokens")
_PROMPT = ("model.thinking", "model.chat_template_kwargs")
_SYSTEM = ("data.system", "task.system")
_ROWS = ("data.prompt", "data.system")
_REWARD = "exact_match"


def next_commands(result: RunResult, config: RunConfig) -> dict[str, str]:
    """Return what to do with the adapter of a run, each with its command line.

    The adapter is the one that the name of the run stands for.
    """
    directory = result.directory
    run = short_path(directory.path)
    adapter = short_path(directory.chosen_adapter())
    model = _flags(config, *_MODEL, *_PROMPT)
    with_adapter = ["--adapter", adapter]
    commands = {"try it": ["chat", *with_adapter, *model, *_flags(config, *_SYSTEM)]}
    if isinstance(config, TrainConfig):
        commands["compare it"] = ["eval", "--config", short_path(directory.config), *with_adapter]
    elif directory.validation_rows.exists():
        measured = ["--eval-data", short_path(directory.validation_rows)]
        rows = [*_row_flags(config), "--reward", _REWARD, *with_adapter, *model]
        commands["compare it"] = ["eval", *measured, *rows]
        commands["train it on"] = ["train", "--data", _training_rows(config), *measured, *rows]
    if "compare it" in commands and (start := config.adapter.start):
        # What a run has changed shows beside what it began with.
        commands["compare it"] += ["--before", short_path(start)]
    commands["serve it"] = ["serve", *with_adapter, *model]
    commands["look at it"] = ["report", run]
    exported = f"{run}-export"
    commands["export it"] = ["export", run, *_export_flags(config, exported)]
    return {name: shlex.join(["textpolicy", *words]) for name, words in commands.items()}


def note_about_reward(result: RunResult) -> str:
    """Return what a person must know before reinforcement learning follows supervised training."""
    if result.directory.validation_rows.exists():
        return (
            f"{_REWARD} is 1 for an answer that equals the row's. Put your own reward in its "
            "place: --reward FILE.py"
        )
    return (
        "To measure rewards, or to train by reinforcement learning next, name rows with a prompt, "
        "and a reward: textpolicy train --adapter ADAPTER --data ROWS --reward FILE.py"
    )


def _row_flags(config: SFTConfig) -> list[str]:
    """Return the flags by which `eval` and `train` read the rows as the run did.

    The ready reward reads the right answer in the column `answer`.
    """
    data = config.data
    columns = dict(data.columns or {})
    learned = columns.pop("completion", "completion")
    columns |= {"answer": data.gold_column or learned}
    if columns["answer"] == "answer":
        del columns["answer"]
    named = changed(config, {"data.columns": columns or None})
    return _flags(named, "data.columns", *_ROWS)


def _training_rows(config: SFTConfig) -> str:
    """Return the training rows as `train` reads them: a folder's rows are in its file."""
    source = str(config.data.source)
    file = Path(source) / "train.jsonl"
    return str(file) if file.is_file() else source


def next_lines(commands: dict[str, str]) -> str:
    """Return the commands as lines for people."""
    return "next:\n" + table([(f"  {name}", line) for name, line in commands.items()])


def _export_flags(config: RunConfig, output: str) -> list[str]:
    """Return the flags of an export that keeps the whole update, whatever the base is."""
    flags = ["--to", "mlx-lm", "--output", output]
    if config.model.quantize is not None:
        # No other program quantizes the base as the run did.
        flags = ["--to", "mlx", "--dequantize", "--dtype", "float32", "--output", output]
    return [*flags, "--force"] if os.path.exists(output) else flags


def _flags(config: RunConfig, *keys: str) -> list[str]:
    """Return the flags of these settings, where they are not the defaults."""
    pairs = zip(settings_of(config), settings_of(type(config)()), strict=True)
    given = [mine for mine, default in pairs if mine.default != default.default]
    return [word for one in given if one.key in keys for word in flag_words(one)]
