"""`run`: a run from its config, as `textpolicy train` and `textpolicy sft` start it."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from textpolicy.config import (
    SFTConfig,
    TrainConfig,
    changed,
    check_can_be_read_back,
    config_from,
    read_toml,
)
from textpolicy.device_sizes import sizes_of, using_sizes
from textpolicy.errors import ConfigError
from textpolicy.experiment.assembly import RunConfig, checkpoints_of, find_algorithm, source_of
from textpolicy.experiment.event_lines import EventLines
from textpolicy.experiment.events import EventListener, Reporter, RunResult
from textpolicy.experiment.following import (
    check_can_be_divided,
    check_ranks,
    check_same_files,
    followed_run,
    send_start,
)
from textpolicy.experiment.identity import identity_of
from textpolicy.experiment.model_defaults import low_rate_note, with_model_defaults
from textpolicy.experiment.paths import with_absolute_paths
from textpolicy.experiment.preflight import check_before_start
from textpolicy.experiment.reinforcement import train_policy
from textpolicy.experiment.resuming import (
    RUN,
    Parts,
    Start,
    check_changes,
    check_files,
    check_kind,
    check_length,
    config_of_checkpoint,
    newest_checkpoint,
    read_started_config,
    run_facts,
    telling_how_to_resume,
)
from textpolicy.experiment.reward_address import with_reward_address
from textpolicy.experiment.supervised import train_supervised
from textpolicy.experiment.tasks import find_task
from textpolicy.experiment.threads import apply_thread_option, thread_advice
from textpolicy.ranks import Ranks, join_ranks
from textpolicy.ranks.joining import ranks_here
from textpolicy.runs import RunDirectory, new_directory
from textpolicy.tracking.report import write_report
from textpolicy.training.checkpoint import seed_random_numbers


def run(
    config: RunConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    force: bool = False,
    on_event: EventListener | None = None,
    ranks: Ranks | None = None,
) -> RunResult:
    """Train as the config says, keep everything in one run directory, and return the result.

    `config` is a TrainConfig, an SFTConfig, a TOML file, or a mapping of sections such as
    {"task": {"env": "sort"}, "run": {"steps": 100}}; a mapping with a "data" section is supervised
    training, and the reward in a mapping may be a function or `Rewards` of an imported file.
    `output` is the run directory, by default a new one in `runs`. `resume` names a run directory to
    resume from its last checkpoint; `config` may then be left out, or hold only what changes; a
    change that alters the numbers of the run needs `force`.

    `on_event` is called with every event, and the run stops after the step in which it returns
    Progress.STOP. Without it, the lines of notes, alarms, doubts and measurements, and a step every
    few seconds, go to standard error; `on_event=lambda event: None` shows nothing.

    `ranks` are the processes that train together, by default those that the environment describes.
    The first rank's config counts, and the first rank keeps the run. The result of another rank
    names a directory that is gone.
    """
    ranks = join_ranks() if ranks is None else ranks
    if not ranks.is_first:
        return _follow(ranks, Reporter(on_event))
    directory = RunDirectory(Path(resume)) if resume is not None else None
    settings = with_absolute_paths(_settings(config, directory, output))
    check_can_be_read_back(settings)
    check_can_be_divided(settings, ranks.size)
    workers = settings.rollout.workers if isinstance(settings, TrainConfig) else 0
    apply_thread_option(settings.model, workers=workers)
    # Before the user's code is loaded, which may choose seeds of its own.
    seed_random_numbers(settings.run.seed)
    report = Reporter(on_event or EventLines())
    if advice := thread_advice(settings.model, workers=workers):
        report.note(advice)
    if directory:
        return _resume(settings, directory, report, ranks, force=force)
    name = _name_of(settings)
    # A task that cannot be found must leave no folder behind.
    settings, parts = _parts(settings, settings.run.output or Path("runs"), report, fresh=True)
    directory = _new_run(settings, name)
    with directory.lock(), telling_how_to_resume(directory, settings):
        # Another process may have claimed the same folder, and ended.
        directory.check_is_new()
        directory.remove_partial_files()
        checkpoints = checkpoints_of(settings, directory, ranks)
        start = Start(checkpoints=checkpoints, parts=parts, ranks=ranks)
        return _train(settings, directory, report, start)


def _follow(ranks: Ranks, report: Reporter) -> RunResult:
    """Take part in the run of the first rank."""
    with followed_run(ranks) as followed:
        settings = followed.settings
        apply_thread_option(settings.model)
        seed_random_numbers(settings.run.seed)
        algorithm = find_algorithm(settings.algorithm)
        parts = Parts(task=find_task(settings.task, settings.run.seed), algorithm=algorithm)
        return _train(settings, followed.directory, report, followed.start(ranks, parts))


def _resume(
    settings: RunConfig,
    directory: RunDirectory,
    report: Reporter,
    ranks: Ranks,
    *,
    force: bool,
) -> RunResult:
    with directory.lock(), telling_how_to_resume(directory, settings):
        directory.remove_partial_files()
        checkpoints = checkpoints_of(settings, directory, ranks)
        found = newest_checkpoint(checkpoints, directory, report.note)
        before = config_of_checkpoint(found) if found else read_started_config(directory)
        check_changes(with_absolute_paths(before), settings, directory, force=force)
        if found:
            check_length(found, before, settings, directory, report.note)
            check_ranks(found, ranks, force=force)
        done = found.step if found else 0
        settings, parts = _parts(
            settings, directory.path, report, written=directory.size, steps_done=done
        )
        start = Start(checkpoints=checkpoints, parts=parts, resume=found, force=force, ranks=ranks)
        return _train(settings, directory, report, start)


def _parts(
    settings: RunConfig,
    folder: Path,
    report: Reporter,
    *,
    fresh: bool = False,
    written: int = 0,
    steps_done: int = 0,
) -> tuple[RunConfig, Parts]:
    """Return what is found before anything large is read, after the checks of the preflight.

    The config comes with it, with its sizes: that of a `fresh` run gets the defaults that depend on
    its model too.
    """
    if isinstance(settings, SFTConfig):
        settings, data, _ = check_before_start(settings, None, folder, report.note, written=written)
        return settings, Parts(data=data)
    algorithm = find_algorithm(settings.algorithm)
    task = find_task(settings.task, settings.run.seed)
    if fresh:
        settings = with_model_defaults(settings)
        if low_rate := low_rate_note(settings):
            report.note(low_rate)
    settings, _, time = check_before_start(
        settings,
        task[0],
        folder,
        report.note,
        written=written,
        steps_done=steps_done,
        processes=ranks_here(),
    )
    return settings, Parts(task=task, algorithm=algorithm, time=time)


def _train(
    settings: RunConfig, directory: RunDirectory, report: Reporter, start: Start
) -> RunResult:
    ranks = start.ranks
    if ranks.is_first and isinstance(settings, TrainConfig):
        send_start(settings, directory, start)
    identity = identity_of(settings)
    check_same_files(identity, ranks)
    if start.resume:
        check_files(start.resume, identity, report.note, force=start.force)
    else:
        directory.remove_earlier_start()
    facts = run_facts(settings, identity)
    start.checkpoints.facts[RUN] = lambda: facts
    with using_sizes(sizes_of(settings.sizes)):
        if isinstance(settings, SFTConfig):
            result = train_supervised(settings, directory, report, start)
        else:
            result = train_policy(settings, directory, report, start)
    if not ranks.is_first:
        return result
    try:
        write_report([directory.path])
    except ConfigError as error:
        # A page of the user is in the place of the report. The run itself is whole.
        report.note(str(error))
    return result


def _settings(
    config: RunConfig | Mapping[str, Any] | str | Path | None,
    directory: RunDirectory | None,
    output: str | Path | None,
) -> RunConfig:
    """Return the config of a new run, or of the run in `directory` with what `config` changes."""
    started = read_started_config(directory) if directory else None
    settings = started if started and config is None else _config_of(config, started)
    if started and directory:
        check_kind(started, settings, directory)
        settings = _with_sizes_of(started, settings)
    return settings if output is None else changed(settings, {"run.output": Path(output)})


def _with_sizes_of(started: RunConfig, settings: RunConfig) -> RunConfig:
    """Return the settings with the sizes of the run that is resumed, where they set none."""
    given = {name for name, size in asdict(settings.sizes).items() if size is not None}
    before = asdict(started.sizes).items()
    return changed(settings, {f"sizes.{name}": v for name, v in before if name not in given})


def _config_of(
    config: RunConfig | Mapping[str, Any] | str | Path | None, started: RunConfig | None = None
) -> RunConfig:
    """Return the config that was given in any form; a mapping changes `started` if there is one."""
    if isinstance(config, TrainConfig | SFTConfig):
        return config
    if isinstance(config, Mapping):
        defaults = started or (SFTConfig() if "data" in config else TrainConfig())
        return config_from(with_reward_address(config), defaults, "The config given to run()")
    if config is None:
        raise ConfigError(
            "no config is given. Pass one, for example run({'task': {'env': 'sort'}}), or name a "
            "run directory to resume: run(resume='runs/sort')"
        )
    path = Path(config)
    supervised = path.is_file() and "\n[data]" in f"\n{path.read_text('utf-8', 'replace')}"
    return read_toml(path, started or (SFTConfig() if supervised else TrainConfig()))


def _name_of(config: RunConfig) -> str:
    """Return the name of a run: that of its environment or data. Raise if there is no data."""
    if isinstance(config, TrainConfig):
        return config.task.env or Path(config.task.data or "").stem
    return Path(source_of(config)).stem


def _new_run(config: RunConfig, name: str) -> RunDirectory:
    """Return the directory of a new run, made and writable, before anything is loaded."""
    directory = RunDirectory(config.run.output) if config.run.output else new_directory(name)
    directory.claim()
    return directory
