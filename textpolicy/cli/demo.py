"""`textpolicy demo`: one short run on the embedded model, its files thrown away at the end."""

import sys
from argparse import Namespace
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from textpolicy.cli.experiment import run_experiment
from textpolicy.cli.options import DEMO
from textpolicy.cli.report import Report
from textpolicy.cli.train import describe
from textpolicy.tracking.console import Console


def run(options: Namespace) -> Report:
    settings = replace(DEMO, steps=options.steps, seed=options.seed)
    with TemporaryDirectory() as folder, closing(Console(sys.stderr, settings.steps)) as console:
        console.note(
            f"GRPO with LoRA on the embedded model: task {settings.env!r}, {settings.steps} steps "
            f"of {settings.groups_per_step} x {settings.group_size} completions"
        )
        outcome = run_experiment(settings, Path(folder), console)
    data = {
        "before": outcome.before.reward,
        "after": outcome.after.reward,
        "seconds": round(outcome.seconds, 1),
        "steps": outcome.steps,
    }
    return Report(data=data, text=describe(outcome))
