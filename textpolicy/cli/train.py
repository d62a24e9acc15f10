"""`textpolicy train`: a run with the settings of its options."""

import sys
from argparse import Namespace
from contextlib import closing
from dataclasses import asdict, fields
from pathlib import Path

from textpolicy.cli.experiment import Outcome, fresh_folder, run_experiment
from textpolicy.cli.options import RunSettings
from textpolicy.cli.report import Report
from textpolicy.tracking.console import Console


def run(options: Namespace) -> Report:
    settings = RunSettings(**{f.name: getattr(options, f.name) for f in fields(RunSettings)})
    with closing(Console(sys.stderr, settings.steps)) as console:
        source = settings.env or Path(settings.data or "").stem
        outcome = run_experiment(settings, options.output or fresh_folder(source), console)
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
            "had the best rolling reward"
        )
    if outcome.updates == 0:
        text += (
            "\nno update was made, so the adapters change nothing: does the reward ever differ "
            "between completions of one task?"
        )
    return text
