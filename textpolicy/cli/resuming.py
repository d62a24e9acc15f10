"""--resume: the config that a run was begun with, and what may be changed of it."""

import shlex
import tomllib
from argparse import Namespace
from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from textpolicy.cli.flags import configured
from textpolicy.config import SFTConfig, TrainConfig, read_toml, settings_of
from textpolicy.config.settings import Setting, sections_of
from textpolicy.errors import ConfigError, RunInterruptedError, UnwritableError
from textpolicy.runs import RunDirectory

C = TypeVar("C")
# Where a run is kept and how it is watched changes none of its numbers.
WATCHING = frozenset({"run.output", "run.sample_groups", "tracking"})


def taken_up(
    defaults: C,
    options: Namespace,
    free: Collection[str] = WATCHING,
    fixed: Collection[str] = (),
) -> tuple[C, RunDirectory]:
    """The config of the run to go on with; an error with the differences if others are asked for.

    What is `free` to change is named by key or by section. So is what is `fixed` by a checkpoint:
    the key of what never changes, the section of what changes if that makes no other rows.
    """
    directory = RunDirectory(options.resume)
    if not directory.exists:
        raise ConfigError(
            f"{directory.path} holds no run to go on with: it has no {directory.config.name}. "
            "Start one with --output, and without --resume"
        )
    _check_command(directory, defaults)
    begun = read_toml(directory.config, defaults)
    config = configured(begun, options)
    changes = [
        (then, now)
        for then, now in zip(settings_of(begun), settings_of(config), strict=True)
        if then.default != now.default
    ]
    for _, now in changes:
        if now.key == "run.output":
            _check_place(directory, now.default)
    if not options.force:
        _check_changes(changes, free, fixed, directory)
    return config, directory


def _check_changes(
    changes: Sequence[tuple[Setting, Setting]],
    free: Collection[str],
    fixed: Collection[str],
    directory: RunDirectory,
) -> None:
    # Of two options that exclude each other, the one that is given now is told of too.
    given_up = {now.key for _, now in changes if now.option.instead_of and now.default is None}
    refused = [
        (then, now)
        for then, now in changes
        if {then.key, f"{then.section}.{then.option.instead_of}"} & given_up
        or not {then.key, then.section} & set(free)
    ]
    if refused:
        asked = [now for _, now in refused if now.key not in given_up]
        lines = [f"{then.key}: {_shown(then)} there, {_shown(now)} now" for then, now in refused]
        raise ConfigError(
            f"the run in {directory.path} was begun with other options:\n  "
            + "\n".join(["\n  ".join(lines), *_advice(asked, fixed, directory)])
        )


def _shown(setting: Setting) -> str:
    return "not given" if setting.default is None else repr(setting.default)


def _advice(
    refused: Sequence[Setting], fixed: Collection[str], directory: RunDirectory
) -> list[str]:
    """What can be done about options that are others now."""
    # Before there is a checkpoint, a run begins anew with whatever it is given.
    held = fixed if any(directory.checkpoints.glob("*.safetensors")) else ()
    bound = [one for one in refused if one.key in held]
    rows = [one for one in refused if one.section in held and one.key not in held]
    others = [one for one in refused if not {one.key, one.section} & set(held)]
    advice: list[str] = []
    if bound:
        advice.append(
            f"The checkpoint is bound to {_keys(bound)}, and --force changes nothing about that: "
            "give what was given there, or begin a new run without --resume"
        )
    if rows:
        advice.append(
            f"With other {_keys(rows)}, --force goes on only if the rows come out the same, as "
            "those of a file that was moved: give what was given there, or begin a new run, which "
            "may start from these adapters by --adapter"
        )
    if others:
        advice.append(f"Leave out {_keys(others)}, or go on with that all the same by --force")
    return advice


def _keys(settings: Sequence[Setting]) -> str:
    return " and ".join(setting.key for setting in settings)


def _check_command(directory: RunDirectory, defaults: object) -> None:
    """An error with the command to go on by, if the run is one of another command."""
    try:
        sections = set(tomllib.loads(directory.config.read_text("utf-8")))
    except (OSError, ValueError):
        return
    commands = {"train": TrainConfig(), "sft": SFTConfig()}
    fitting = [name for name, config in commands.items() if sections <= set(sections_of(config))]
    if len(fitting) == 1 and not sections <= set(sections_of(defaults)):
        raise ConfigError(
            f"{directory.path} holds a run of `textpolicy {fitting[0]}`: go on with it by "
            f"textpolicy {fitting[0]} --resume {shlex.quote(str(directory.path))}"
        )


def _check_place(directory: RunDirectory, output: Path | None) -> None:
    """A run goes on where it lies, also if it was moved there."""
    if output and output.resolve() != directory.path.resolve():
        raise ConfigError(
            f"the run in {directory.path} goes on in that folder, and --output is {output}: leave "
            "--output out, or move the folder and name its new place by --resume"
        )


@contextmanager
def to_go_on(directory: RunDirectory, command: str) -> Generator[None]:
    """A full disk and its like become an error that says how the run goes on, if it can."""
    try:
        yield
    except (UnwritableError, OSError) as error:
        if not any(directory.checkpoints.glob("*.safetensors")):
            raise
        raise RunInterruptedError(
            f"{error}\nThe run has a checkpoint; when that is put right, go on with: "
            f"textpolicy {command} --resume {shlex.quote(str(directory.path))}"
        ) from error
