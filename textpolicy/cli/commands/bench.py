"""`textpolicy bench`: where the time of a training step goes, and how much memory it takes."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from textpolicy.cli.answer import Answer, table
from textpolicy.cli.flags import configured
from textpolicy.cli.measured_steps import RealSteps, run_measured_steps
from textpolicy.cli.output import print_note
from textpolicy.cli.progress import showing_progress
from textpolicy.config import TrainConfig, changed
from textpolicy.errors import ModelError
from textpolicy.experiment.model_defaults import with_model_defaults
from textpolicy.experiment.run_size import plan_step, replies_within
from textpolicy.machine import size_text

_STEPS = 20
"""More steps would hardly change the means."""
_PARTS = ("generate", "reward", "logprobs", "update", "publish", "reload", "checkpoint")


def run(options: Namespace) -> Answer:
    with showing_progress(print_note):
        return _run(options)


def _run(options: Namespace) -> Answer:
    config = configured(TrainConfig(), options)
    if config.task.env is None and config.task.data is None:
        config = changed(config, {"task.env": "add"})
    config = with_model_defaults(config)
    measured = run_measured_steps(config, steps=_STEPS, seconds=options.seconds)
    data = _data(config, measured)
    return Answer(data=data, text=_text(data))


def _data(config: TrainConfig, measured: RealSteps) -> dict[str, Any]:
    metrics = measured.metrics
    seconds = {name: metrics.get(f"time/{name}", 0.0) for name in _PARTS}
    seconds["rest"] = max(0.0, metrics["time/step"] - sum(seconds.values()))
    updating = seconds["logprobs"] + seconds["update"]
    return {
        "model": config.model.name,
        "task": measured.environment.name,
        "device": mx.default_device().type.name,
        "groups": config.rollout.groups_per_step,
        "group_size": config.rollout.group_size,
        "steps": measured.steps,
        "warmed_up": measured.warmed_up,
        "seconds": seconds,
        "shares": {name: part / metrics["time/step"] for name, part in seconds.items()},
        "tokens_per_second": {
            "generate": metrics["num_tokens"] / seconds["generate"],
            "update": metrics["num_tokens"] / updating,
        },
        **measured.lengths,
        "peak_bytes": measured.peaks,
        "planned_bytes": _planned_bytes(config, measured),
        "metrics": metrics,
    }


def _planned_bytes(config: TrainConfig, measured: RealSteps) -> dict[str, int] | None:
    """Return the planned peaks for the lengths that were seen, or None if there is no plan."""
    if replies_within(measured.environment):
        return None
    try:
        return plan_step(config, measured.lengths).peaks
    except ModelError:
        return None


def _text(data: Mapping[str, Any]) -> str:
    metrics, speeds, planned = data["metrics"], data["tokens_per_second"], data["planned_bytes"]
    warm_up = "after a warm-up step" if data["warmed_up"] else "and no time for a warm-up step"
    rows = [("a step", f"{metrics['time/step']:7.3f} s")]
    for name, seconds in data["seconds"].items():
        speed = f"  {speeds[name]:,.0f} tokens/s" if name in speeds else ""
        rows.append((f"  {name}", f"{seconds:7.3f} s  {data['shares'][name]:4.0%}{speed}"))
    for name, peak in data["peak_bytes"].items():
        plan = f"planned {size_text(planned[name])}" if planned else "not planned"
        rows.append((f"peak of {name}", f"{size_text(peak)}, {plan}"))
    lengths = f"at most {data['prompt_tokens']} and {data['completion_tokens']} tokens"
    rows.append(("prompts and completions", lengths))
    return (
        f"{data['model']} on {data['task']}, {data['groups']} x {data['group_size']} completions a "
        f"step, on the {data['device']}: {data['steps']} steps, {warm_up}\n\n{table(rows)}"
    )
