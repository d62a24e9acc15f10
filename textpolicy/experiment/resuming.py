"""Resuming a run: the config that it was started with, and which options may change."""

import errno
import shlex
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textpolicy.algorithms import Algorithm
from textpolicy.backend import versions
from textpolicy.config import SFTConfig, TrainConfig, config_from, read_toml, settings_of, to_toml
from textpolicy.config.settings import Setting
from textpolicy.environments import Environment
from textpolicy.errors import (
    ConfigError,
    RewardError,
    RunInterruptedError,
    TooManyFailuresError,
    UnreadableError,
    UnwritableError,
)
from textpolicy.experiment.assembly import RunConfig
from textpolicy.experiment.identity import Hashes, changes_of
from textpolicy.planning.time_plan import TimePlan
from textpolicy.ranks import ALONE, Ranks
from textpolicy.rewards import Rewards
from textpolicy.rollout.executors.crew import WorkersLostError
from textpolicy.runs import RunDirectory
from textpolicy.tracking.jsonl import read_metrics
from textpolicy.training.checkpoint import Checkpoint, Checkpoints
from textpolicy.training.sft import SFTData
from textpolicy.untrusted.parsing import parse_toml, read_toml_file

RUN = "run"
"""The fact of a checkpoint that says with which options and files the run was trained."""

# Where a run is kept, how it is tracked and when it ends changes none of its numbers. More steps
# than before are free too.
_FREE_IN_RL = frozenset(
    {
        *("tracking", "run.output", "run.sample_groups", "run.checkpoint_every"),
        *("run.keep_checkpoints", "run.keep_adapters", "run.stop_on_collapse", "run.steps"),
        *("run.limits", "run.step_deadline", "run.stop_on_stall"),
        *("rollout.workers", "rollout.worker_deadline", "rollout.swap", "rollout.ray"),
    }
)
_FREE_IN_SFT = frozenset(
    {
        *("tracking", "run.output", "run.steps_per_report", "run.eval_every"),
        *("run.validation_batches", "run.checkpoint_every", "run.limits"),
        *("run.step_deadline", "run.stop_on_stall"),
        *("trainer.iterations", "trainer.epochs", "trainer.patience"),
    }
)
# What a checkpoint holds cannot change, with --force neither: its weights began with these
# adapters, have this shape and are trained on this base, and its random states began with this
# seed. Supervised training is bound to the rows of each update as well, so another [data] section
# needs rows that come out the same.
_BOUND_IN_RL = frozenset(
    {
        *("adapter.start", "adapter.kind", "adapter.rank", "adapter.num_layers", "adapter.keys"),
        *("adapter.target_modules", "model.quantize", "model.quantize_mode"),
        *("model.quantize_group", "run.seed"),
    }
)
_BOUND_IN_SFT = _BOUND_IN_RL | {"trainer.batch_size", "trainer.accumulation", "data.packing"}
# What a write error means for the run, not for what the user has typed.
_MACHINE_ERRORS = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ENOMEM),
        *(errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ENODEV, errno.ENXIO),
    }
)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What is known before a model is loaded: task, algorithm, rows, and the announced time."""

    task: tuple[Environment, Rewards] | None = None
    algorithm: Algorithm | None = None
    data: SFTData | None = None
    time: TimePlan | None = None


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run starts: from the checkpoint `resume`, or without one from its beginning.

    With `force`, a checkpoint is resumed although the tasks differ from those that it was made
    with. The `ranks` start together.
    """

    checkpoints: Checkpoints
    parts: Parts = Parts()
    resume: Checkpoint | None = None
    force: bool = False
    ranks: Ranks = ALONE


def command_of(config: RunConfig) -> str:
    """Return the command that starts runs of this config: "train" or "sft"."""
    return "sft" if isinstance(config, SFTConfig) else "train"


def resume_line(directory: RunDirectory, config: RunConfig) -> str:
    """Return the command line that resumes a run."""
    return f"textpolicy {command_of(config)} --resume {shlex.quote(str(directory.path))}"


def read_started_config(directory: RunDirectory) -> RunConfig:
    """Read the config of a run, or of its newest checkpoint if the file is lost.

    Raise ConfigError if the folder has no run.
    """
    if not directory.exists:
        if directory.has_checkpoint and not directory.config.exists():
            newest = Checkpoints(directory.checkpoints).newest()
            if newest and RUN in newest.facts:
                return config_of_checkpoint(newest)
        raise ConfigError(
            f"{directory.path} holds no run to resume: it has no {directory.config.name} of a run. "
            "Name the folder of a run, or start a new run with --output and without --resume"
        )
    try:
        supervised = "data" in read_toml_file(directory.config)
    except UnreadableError:
        supervised = False
    return read_toml(directory.config, SFTConfig() if supervised else TrainConfig())


def config_of_checkpoint(checkpoint: Checkpoint) -> RunConfig:
    """Return the config that the run had when the checkpoint was saved."""
    content = parse_toml(checkpoint.facts[RUN]["config"])
    defaults = SFTConfig() if "data" in content else TrainConfig()
    return config_from(content, defaults, f"the config in the checkpoint of step {checkpoint.step}")


def newest_checkpoint(
    checkpoints: Checkpoints, directory: RunDirectory, note: Callable[[str], None]
) -> Checkpoint | None:
    """Return the newest whole checkpoint, and note what is damaged or of other versions."""
    found = checkpoints.newest()
    for damage in checkpoints.damaged:
        note(f"A damaged checkpoint was skipped: {damage}")
    if found is None:
        _check_nothing_is_lost(checkpoints, directory)
        return None
    if RUN not in found.facts:
        raise ConfigError(
            f"the checkpoints in {directory.checkpoints} were saved by your own call of train_rl "
            "or train_sft. Resume them there, with resume=checkpoints.newest()"
        )
    for package, now in versions().items():
        if (then := found.facts[RUN]["versions"][package]) != now:
            note(f"{package} was {then} and is {now}: numbers may differ in their last digits")
    return found


def _check_nothing_is_lost(checkpoints: Checkpoints, directory: RunDirectory) -> None:
    """Raise if the run had a checkpoint: to start it again would remove its adapters."""
    done = max((int(row["step"]) for row in read_metrics(directory.metrics)), default=0)
    # The row of step n is written before the checkpoint of n + 1 steps.
    if done > checkpoints.every and directory.latest.exists():
        raise ConfigError(
            f"{directory.checkpoints} holds no checkpoint, but {directory.metrics.name} has the "
            f"row of step {done}, so the run had one. Put the checkpoints back, or start a new run "
            f"from the adapters with: --adapter {directory.latest}"
        )


def run_facts(config: RunConfig, identity: Hashes) -> dict[str, Any]:
    """Return what a resumed run is compared with, for a checkpoint."""
    return {"config": to_toml(config), "identity": identity, "versions": versions()}


def check_files(
    checkpoint: Checkpoint, identity: Hashes, note: Callable[[str], None], *, force: bool
) -> None:
    """Raise ConfigError if files have changed since the checkpoint; with `force`, note them."""
    changed = changes_of(checkpoint.facts[RUN]["identity"], identity)
    if changed and not force:
        raise ConfigError(
            "the run was trained with other files than there are now:\n  "
            + "\n  ".join(changed)
            + "\nPut the earlier files back, or add --force to resume with the present files"
        )
    for change in changed:
        note(f"resuming although {change} since the checkpoint")


def check_length(
    checkpoint: Checkpoint,
    before: RunConfig,
    config: RunConfig,
    directory: RunDirectory,
    note: Callable[[str], None],
) -> None:
    """Raise ConfigError if the run has more steps already; note what its length means."""
    if isinstance(config, SFTConfig) or isinstance(before, SFTConfig):
        return
    done, steps = checkpoint.step, config.run.steps
    if steps < done:
        raise ConfigError(
            f"the run in {directory.path} has {done} steps already, and --steps is {steps}; "
            f"expected at least {done}"
        )
    if steps == done:
        note(
            f"The run is finished: all {done} steps are done. For more steps, type: "
            f"{resume_line(directory, config)} --steps {2 * done}"
        )
    if steps != before.run.steps and config.trainer.schedule != "constant":
        note(
            f"The {config.trainer.schedule} learning rate now falls over {steps} steps, not "
            f"{before.run.steps}: a run of {steps} steps would have had other rates so far"
        )


def save_options(config: RunConfig, directory: RunDirectory, start: Start) -> None:
    """Write the config of a run whose checkpoint fits, and the checkpoint if the config changed.

    If the process is killed now, the run resumes with the options that were given.
    """
    directory.write_config(to_toml(config))
    facts = {name: fact() for name, fact in start.checkpoints.facts.items()}
    if start.resume and facts.get(RUN) != start.resume.facts.get(RUN):
        start.checkpoints.rewrite(start.resume)


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

    A run of another kind, another output folder, and what a checkpoint is bound to are refused in
    any case.
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
    held = _bound(directory, config)
    if force and not any(now.key in held for _, now in changes):
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


def _bound(directory: RunDirectory, config: RunConfig) -> frozenset[str]:
    # Without a checkpoint the run starts from its beginning, with any options.
    if not directory.has_checkpoint:
        return frozenset()
    return _BOUND_IN_SFT if isinstance(config, SFTConfig) else _BOUND_IN_RL


def _advice(refused: Sequence[Setting], directory: RunDirectory, config: RunConfig) -> list[str]:
    held = _bound(directory, config)
    bound = [one for one in refused if one.key in held]
    supervised = held and isinstance(config, SFTConfig)
    rows = [one for one in refused if supervised and one.section == "data" and one not in bound]
    others = [one for one in refused if one not in bound and one not in rows]
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
        advice.append(
            f"Leave out {_keys(others)}, or add --force to resume with the new value. An edited "
            f"{directory.config.name} is a new value too"
        )
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
    """Add how to resume to errors that time mends, such as a full disk or a judge that is gone."""
    try:
        yield
    except (UnwritableError, OSError, MemoryError, RuntimeError) as error:
        if not directory.config.is_file() or not _is_of_the_machine(error):
            raise
        if directory.has_checkpoint:
            state = "The run has a checkpoint. When the cause is mended, resume it with"
        else:
            state = "The run has no checkpoint yet. Begin it again with"
        what = str(error) or "the memory is full"
        kind = type(error) if isinstance(error, RewardError) else RunInterruptedError
        raise kind(f"{what}\n{state}: {resume_line(directory, config)}") from error


def _is_of_the_machine(error: Exception) -> bool:
    if isinstance(error, UnwritableError | MemoryError | WorkersLostError | TooManyFailuresError):
        return True
    if isinstance(error, OSError):
        return error.errno in _MACHINE_ERRORS
    # mlx has no class of its own for memory that it does not get.
    return type(error) is RuntimeError and "allocate" in str(error)
