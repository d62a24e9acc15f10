"""`textpolicy train`: a run with the settings that were asked for."""

import sys
from argparse import Namespace
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from textpolicy.cli.answer import Report
from textpolicy.cli.dry_run import show_plan
from textpolicy.cli.flags import configured
from textpolicy.cli.resuming import taken_up, to_go_on
from textpolicy.config import TrainConfig
from textpolicy.experiment.rl_run import Outcome, run_experiment
from textpolicy.experiment.threads import use_threads
from textpolicy.runs import RunDirectory, new_directory
from textpolicy.tracking.console import Console
from textpolicy.tracking.report import write_report


def run(options: Namespace) -> Report:
    config, directory = _asked(options)
    use_threads(config.model)
    if options.dry_run:
        return show_plan(config)
    begun = directory is not None
    if directory is None:
        output = config.run.output
        source = config.task.env or Path(config.task.data or "").stem
        directory = RunDirectory(output) if output else new_directory(source)
    with (
        closing(Console(sys.stderr, config.run.steps)) as console,
        to_go_on(directory, "train"),
    ):
        outcome = run_experiment(config, directory, console, begun=begun, forced=options.force)
    write_report([directory.path])
    code = 0 if outcome.after else outcome.request.exit_code
    return Report(data=_data(outcome), text=_text(outcome), exit_code=code)


def _asked(options: Namespace) -> tuple[TrainConfig, RunDirectory | None]:
    if options.resume:
        return taken_up(TrainConfig(), options)
    return configured(TrainConfig(), options), None


def describe(outcome: Outcome) -> str:
    """What a person wants to know of a run that came to its end."""
    assert outcome.after
    text = (
        f"greedy reward on {outcome.after.count} held-out tasks: "
        f"{outcome.before} before, {outcome.after} after\n"
        f"{outcome.steps} steps in {outcome.seconds:.0f} s"
    )
    if outcome.kept is not None:
        text += (
            f"\nstopped by an alarm; the adapters are again those of version {outcome.kept}, which "
            "had the best reward"
        )
    if outcome.updates == 0:
        text += (
            "\nno update was made, so the adapters change nothing: does the reward ever differ "
            "between completions of one task?"
        )
    return text


def _text(outcome: Outcome) -> str:
    if outcome.after is None:
        return outcome.request.farewell(outcome.directory.path)
    directory = outcome.directory
    return f"{describe(outcome)}\nadapters in {directory.latest}\nreport in {directory.report}"


def _data(outcome: Outcome) -> dict[str, Any]:
    return {
        "before": asdict(outcome.before),
        "after": outcome.after and asdict(outcome.after),
        "steps": outcome.steps,
        "updates": outcome.updates,
        "seconds": outcome.seconds,
        "run": str(outcome.directory.path),
        "adapters": str(outcome.directory.latest),
        "report": str(outcome.directory.report),
        "alarms": outcome.alarms,
        "kept": outcome.kept,
    }
