"""Resuming a run: the config that it was started with, and which options may change."""

import shlex
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from textpolicy.config import SFTConfig, TrainConfig, read_toml, settings_of
from textpolicy.config.settings import Setting
from textpolicy.errors import ConfigError, RunInterruptedError, UnreadableError, UnwritableError
from textpolicy.experiment.assembly import RunConfig
from textpolicy.runs import RunDirectory
from textpolicy.untrusted.parsing import read_toml_file

# Where a run is kept and how it is tracked changes none of its numbers.
_FREE_IN_RL = frozenset(
    {
        "run.output",
        "run.sample_groups",
        "run.limits",
        "run.step_deadline",
        "run.stop_on_stall",
        "tracking",
    }
)
_FREE_IN_SFT = frozenset(
    {
        "run.output",
        "tracking",
        "run.steps_per_report",
        "run.steps_per_eval",
        "run.validation_batches",
        "run.save_every",
        "run.limits",
        "trainer.iterations",
        "trainer.epochs",
        "trainer.patience",
    }
)
# A checkpoint of supervised training is bound to the rows of each update: --force cannot change
# these options, and another [data] section only if its rows come out the same.
_BOUND_IN_SFT = frozenset(
    {"trainer.batch_size", "trainer.accumulation", "data.packing", "run.seed", "data"}
)


def command_of(config: RunConfig) -> str:
    """Return the command that starts runs of this config: "train" or "sft"."""
    return "sft" if isinstance(config, SFTConfig) else "train"


def resume_line(directory: RunDirectory, config: RunConfig) -> str:
    """Return the command line that resumes a run."""
    return f"textpolicy {command_of(config)} --resume {shlex.quote(str(directory.path))}"


def read_started_config(directory: RunDirectory) -> RunConfig:
    """Read the config that a run was started with; raise ConfigError if the folder has no run."""
    if not directory.exists:
        raise ConfigError(
            f"{directory.path} holds no run to resume: it has no {directory.config.name}. Name "
            "the folder of a run, or start a new run with --output and without --resume"
        )
    try:
        supervised = "data" in read_toml_file(directory.config)
    except UnreadableError:
        supervised = False
    return read_toml(directory.config, SFTConfig() if supervised else TrainConfig())


def check_kind(started: RunConfig, config: object, directory: RunDirectory) -> None:
    """Raise ConfigError with the command to type if the run is of the other command."""
    if type(started) is not type(config):
        raise ConfigError(
            f"{directory.path} holds a run of `textpolicy {command_of(started)}`. Resume it with: "
            f"{resume_line(directory, started)}"
        )


def check_changes(
    started: RunConfig, config: RunConfig, directory: RunDirectory, *, force: bool
) -> None:
    """Raise ConfigError with all differences that change a run's numbers, unless `force` is given.

    A run of another kind, and another output folder, are refused in any case.
    """
    check_kind(started, config, directory)
    changes = [
        (then, now)
        for then, now in zip(settings_of(started), settings_of(config), strict=True)
        if then.default != now.default
    ]
    for _, now in changes:
        if now.key == "run.output":
            _check_output(directory, now.default)
    if force:
        return
    free = _FREE_IN_SFT if isinstance(config, SFTConfig) else _FREE_IN_RL
    # An option that gives way to another one is refused together with it.
    replaced = {now.key for _, now in changes if now.option.instead_of and now.default is None}
    refused = [
        (then, now)
        for then, now in changes
        if {then.key, f"{then.section}.{then.option.instead_of}"} & replaced
        or not {then.key, then.section} & free
    ]
    if refused:
        asked = [now for _, now in refused if now.key not in replaced]
        lines = [f"{then.key}: {_shown(then)} before, {_shown(now)} now" for then, now in refused]
        raise ConfigError(
            f"the run in {directory.path} was started with other options:\n  "
            + "\n".join(["\n  ".join(lines), *_advice(asked, directory, config)])
        )


def _shown(setting: Setting) -> str:
    return "not given" if setting.default is None else repr(setting.default)


def _advice(refused: Sequence[Setting], directory: RunDirectory, config: RunConfig) -> list[str]:
    # Without a checkpoint the run starts from its beginning, with any options.
    has_checkpoint = any(directory.checkpoints.glob("*.safetensors"))
    held = _BOUND_IN_SFT if isinstance(config, SFTConfig) and has_checkpoint else frozenset[str]()
    bound = [one for one in refused if one.key in held]
    rows = [one for one in refused if one.section in held and one.key not in held]
    others = [one for one in refused if not {one.key, one.section} & held]
    advice: list[str] = []
    if bound:
        advice.append(
            f"The checkpoint is bound to {_keys(bound)}, and --force does not change that. Give "
            "the same values as before, or start a new run without --resume"
        )
    if rows:
        advice.append(
            f"With another {_keys(rows)}, --force resumes only if the rows stay the same, as those "
            "of a file that was moved. Give the same value as before, or start a new run, which "
            "may start from these adapters by --adapter"
        )
    if others:
        advice.append(f"Leave out {_keys(others)}, or add --force to resume with the new value")
    return advice


def _keys(settings: Sequence[Setting]) -> str:
    return " and ".join(setting.key for setting in settings)


def _check_output(directory: RunDirectory, output: Path | None) -> None:
    if output and output.resolve() != directory.path.resolve():
        raise ConfigError(
            f"the run in {directory.path} is resumed in that folder, and --output is {output}. "
            "Leave out --output, or move the folder and name its new place by --resume"
        )


@contextmanager
def telling_how_to_resume(directory: RunDirectory, config: RunConfig) -> Generator[None]:
    """Inside, a full disk and other write errors say how to resume, if there is a checkpoint."""
    try:
        yield
    except (UnwritableError, OSError) as error:
        if not any(directory.checkpoints.glob("*.safetensors")):
            raise
        raise RunInterruptedError(
            f"{error}\nThe run has a checkpoint. When the cause is mended, resume it with: "
            f"{resume_line(directory, config)}"
        ) from error
