"""`textpolicy train`: a run with the settings that were asked for."""

import sys
from argparse import Namespace
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from textpolicy.cli.experiment import Outcome, fresh_folder, run_experiment
from textpolicy.cli.flags import configured
from textpolicy.cli.memory import show_plan
from textpolicy.cli.report import Report
from textpolicy.cli.threads import use_threads
from textpolicy.config import TrainConfig
from textpolicy.tracking.console import Console


def run(options: Namespace) -> Report:
    config = configured(TrainConfig(), options)
    use_threads(config.model)
    if options.dry_run:
        return show_plan(config)
    with closing(Console(sys.stderr, config.run.steps)) as console:
        source = config.task.env or Path(config.task.data or "").stem
        outcome = run_experiment(config, config.run.output or fresh_folder(source), console)
    data = asdict(outcome) | {"adapters": str(outcome.adapters)}
    return Report(data=data, text=f"{describe(outcome)}\nadapters in {outcome.adapters}")


def describe(outcome: Outcome) -> str:
    """What a person wants to know of a finished run."""
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
