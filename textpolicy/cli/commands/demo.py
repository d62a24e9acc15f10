"""`textpolicy demo`: one short run on the embedded model, its files thrown away at the end."""

import sys
from argparse import Namespace
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from textpolicy.cli.answer import Report
from textpolicy.cli.commands.train import describe
from textpolicy.cli.flags import configured
from textpolicy.config import DEMO
from textpolicy.experiment.rl_run import run_experiment
from textpolicy.experiment.threads import use_threads
from textpolicy.runs import RunDirectory
from textpolicy.tracking.console import Console


def run(options: Namespace) -> Report:
    config = configured(DEMO, options)
    use_threads(config.model)
    steps, rollout = config.run.steps, config.rollout
    with TemporaryDirectory() as folder, closing(Console(sys.stderr, steps)) as console:
        console.note(
            f"GRPO with LoRA on the embedded model: task {config.task.env!r}, {steps} steps "
            f"of {rollout.groups_per_step} x {rollout.group_size} completions"
        )
        outcome = run_experiment(config, RunDirectory(Path(folder)), console)
    if outcome.after is None:
        return Report(data={}, text="stopped", exit_code=outcome.request.exit_code)
    data = {
        "before": outcome.before.reward,
        "after": outcome.after.reward,
        "seconds": round(outcome.seconds, 1),
        "steps": outcome.steps,
    }
    return Report(data=data, text=describe(outcome))
