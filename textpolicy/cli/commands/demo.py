"""`textpolicy demo`: one short run on the embedded model in a temporary folder."""

import shlex
from argparse import Namespace
from tempfile import TemporaryDirectory

from textpolicy.cli.answer import Answer
from textpolicy.cli.commands.train import describe_result
from textpolicy.cli.flags import configured
from textpolicy.cli.listener import listening
from textpolicy.config import DEMO
from textpolicy.experiment import run as run_config


def run(options: Namespace) -> Answer:
    """Train the embedded model on addition and show what the run gained."""
    config = configured(DEMO, options)
    steps, rollout = config.run.steps, config.rollout
    with TemporaryDirectory() as folder, listening(steps) as listener:
        listener.note(
            f"GRPO with LoRA on the embedded model: task {config.task.env!r}, {steps} steps "
            f"of {rollout.groups_per_step} x {rollout.group_size} completions"
        )
        result = run_config(config, output=folder, on_event=listener)
        if not (result.before and result.after):
            return Answer(data={}, text="stopped", exit_code=listener.exit_code(result))
    data = {
        "before": result.before.value,
        "after": result.after.value,
        "seconds": round(result.seconds, 1),
        "steps": result.steps,
    }
    kept = shlex.join(["textpolicy", "train", "--env", str(config.task.env), "--steps", str(steps)])
    text = f"{describe_result(result)}\nThe run was not kept. To keep one, type: {kept}"
    return Answer(data=data, text=text)
