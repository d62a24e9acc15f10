"""`run`: a run from its config, as `textpolicy train` and `textpolicy sft` start it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from textpolicy.config import SFTConfig, TrainConfig, changed, config_from, read_toml
from textpolicy.errors import ConfigError
from textpolicy.experiment.assembly import RunConfig, apply_thread_option, find_algorithm, source_of
from textpolicy.experiment.events import EventListener, Reporter, RunResult
from textpolicy.experiment.preflight import check_before_start
from textpolicy.experiment.reinforcement import train_policy
from textpolicy.experiment.resuming import check_changes, read_started_config, telling_how_to_resume
from textpolicy.experiment.supervised import train_supervised
from textpolicy.experiment.tasks import find_task
from textpolicy.runs import RunDirectory, new_directory
from textpolicy.tracking.report import write_report


def run(
    config: RunConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    force: bool = False,
    on_event: EventListener | None = None,
) -> RunResult:
    """Train as the config says, keep everything in one run directory, and return the result.

    `config` is a TrainConfig, an SFTConfig, a TOML file, or a mapping of sections such as
    {"task": {"env": "sort"}, "run": {"steps": 100}}; a mapping with a "data" section is supervised
    training. `output` is the run directory, by default a new one in `runs`. `resume` names a run
    directory to resume from its last checkpoint; `config` may then be left out, or hold only what
    changes; a change that alters the numbers of the run needs `force`. `on_event` is called with
    every event, and the run stops after the step in which it returns Progress.STOP.
    """
    earlier = RunDirectory(Path(resume)) if resume is not None else None
    started = read_started_config(earlier) if earlier else None
    settings = started if started and config is None else _config_of(config, started)
    if output is not None:
        settings = changed(settings, {"run.output": Path(output)})
    if earlier and started:
        check_changes(started, settings, earlier, force=force)
    apply_thread_option(settings.model)
    # A task that cannot be found must leave no folder behind.
    task, algorithm = None, None
    if isinstance(settings, TrainConfig):
        algorithm, task = find_algorithm(settings.algorithm), find_task(settings.task)
    report = Reporter(on_event)
    folder = earlier.path if earlier else settings.run.output or Path("runs")
    name = _name_of(settings)
    data = check_before_start(settings, task[0] if task else None, folder, report.note)
    directory = earlier or _new_run(settings, name)
    with directory.lock(), telling_how_to_resume(directory, settings):
        directory.remove_partial_files()
        if earlier is None:
            # Another process may have claimed the same folder, and ended.
            directory.check_is_new()
        if isinstance(settings, SFTConfig):
            result = train_supervised(settings, directory, report, data=data)
        else:
            result = train_policy(
                settings, directory, report, task=task, algorithm=algorithm, force=force
            )
    write_report([directory.path])
    return result


def _config_of(
    config: RunConfig | Mapping[str, Any] | str | Path | None, started: RunConfig | None = None
) -> RunConfig:
    """Return the config that was given in any form; a mapping changes `started` if there is one."""
    if isinstance(config, TrainConfig | SFTConfig):
        return config
    if isinstance(config, Mapping):
        defaults = started or (SFTConfig() if "data" in config else TrainConfig())
        return config_from(config, defaults, "The config given to run()")
    if config is None:
        raise ConfigError(
            "no config is given. Pass one, for example run({'task': {'env': 'sort'}}), or name a "
            "run directory to resume: run(resume='runs/sort')"
        )
    path = Path(config)
    supervised = path.is_file() and "\n[data]" in f"\n{path.read_text('utf-8')}"
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
