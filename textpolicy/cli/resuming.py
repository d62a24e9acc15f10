"""--resume: the config that a run was begun with, and what may be changed of it."""

import shlex
from argparse import Namespace
from collections.abc import Collection, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from textpolicy.cli.flags import configured
from textpolicy.config import read_toml, settings_of
from textpolicy.errors import ConfigError, RunInterruptedError, UnwritableError
from textpolicy.runs import RunDirectory

C = TypeVar("C")
# Where a run is kept and how it is watched changes none of its numbers.
WATCHING = frozenset({"run.output", "run.sample_groups", "tracking"})


def taken_up(
    defaults: C, options: Namespace, free: Collection[str] = WATCHING
) -> tuple[C, RunDirectory]:
    """The config of the run to go on with; an error with the differences if others are asked for.

    What is `free` to change is named by key or by section.
    """
    directory = RunDirectory(options.resume)
    if not directory.begun:
        raise ConfigError(
            f"{directory.path} holds no run to go on with: it has no {directory.config.name}. "
            "Start one with --output, and without --resume"
        )
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
    differing = [
        f"{then.key}: {then.default!r} there, {now.default!r} now"
        for then, now in changes
        if not {then.key, then.section} & set(free)
    ]
    if differing and not options.force:
        raise ConfigError(
            f"the run in {directory.path} was begun with other options:\n  "
            + "\n  ".join(differing)
            + "\nLeave these out, or go on with them all the same by --force"
        )
    return config, directory


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
