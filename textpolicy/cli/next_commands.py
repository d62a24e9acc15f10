"""The commands that a person may type after a run, with the paths of the run filled in."""

import os
import shlex
from pathlib import Path

from textpolicy.cli.answer import table
from textpolicy.config import TrainConfig, settings_of
from textpolicy.experiment import RunResult
from textpolicy.experiment.assembly import RunConfig

_MODEL = ("model.name", "model.dtype", "model.allow_special_tokens")


def next_commands(result: RunResult, config: RunConfig) -> dict[str, str]:
    """Return what to do with the adapter of a run, each with its command line.

    The adapter is the best one of the run, or the last one if the run has measured nothing.
    """
    directory = result.directory
    run = short_path(directory.path)
    adapter = short_path(directory.best if directory.best.exists() else directory.latest)
    commands = {"try it": ["chat", "--adapter", adapter, *_model_flags(config)]}
    if isinstance(config, TrainConfig):
        settings, start = short_path(directory.config), config.adapter.start
        commands["compare it"] = ["eval", "--config", settings, "--adapter", adapter]
        # What a run has changed shows beside what it began with.
        commands["compare it"] += ["--before", short_path(start)] if start else []
    commands["serve it"] = ["serve", "--adapter", adapter, *_model_flags(config)]
    commands["look at it"] = ["report", run]
    exported = f"{run}-export"
    commands["export it"] = ["export", run, *_export_flags(config, exported)]
    return {name: shlex.join(["textpolicy", *words]) for name, words in commands.items()}


def next_lines(commands: dict[str, str]) -> str:
    """Return the commands as lines for people."""
    return "next:\n" + table([(f"  {name}", line) for name, line in commands.items()])


def short_path(path: Path) -> str:
    """Return a path as a person would type it: relative if it is below the working directory."""
    relative = os.path.relpath(path)
    # A name that begins with a dash would be read as a flag.
    return str(path) if relative.startswith(("..", "-")) else relative


def _export_flags(config: RunConfig, output: str) -> list[str]:
    """Return the flags of an export that keeps the whole update, whatever the base is."""
    flags = ["--to", "mlx-lm", "--output", output]
    if config.model.quantize is not None:
        # No other program quantizes the base as the run did.
        flags = ["--to", "mlx", "--dequantize", "--dtype", "float32", "--output", output]
    return [*flags, "--force"] if os.path.exists(output) else flags


def _model_flags(config: RunConfig) -> list[str]:
    """Return the flags that load the model as the run did, where they are not the defaults."""
    flags: list[str] = []
    for mine, default in zip(settings_of(config), settings_of(type(config)()), strict=True):
        if mine.key in _MODEL and mine.default != default.default:
            flags += [mine.flag] if mine.default is True else [mine.flag, str(mine.default)]
    return flags
