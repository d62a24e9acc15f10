"""Dry run: the settings of a run and an estimate of its memory, without starting the run."""

from pathlib import Path
from typing import Any

from textpolicy.cli.answer import Answer, table
from textpolicy.cli.measured_steps import RealSteps, run_measured_steps
from textpolicy.config import TrainConfig, to_toml
from textpolicy.experiment.assembly import (
    RunConfig,
    find_algorithm,
    plain_settings,
    service_options,
)
from textpolicy.experiment.paths import with_found_adapter
from textpolicy.experiment.preflight import check_names, find_problems
from textpolicy.experiment.run_size import (
    RunSize,
    SizeEstimator,
    has_agent,
    has_turns,
    plan_step,
)
from textpolicy.experiment.tasks import find_task
from textpolicy.experiment.threads import apply_thread_option, thread_advice
from textpolicy.machine import free_disk_bytes, memory_bytes, size_text
from textpolicy.tracking.open_tracker import check_services

_SHOWN = ("weights", "reference", "adapters", "optimizer")
_KEYS = {"sampling": "estimated_generation_bytes", "training": "estimated_training_bytes"}


def show_plan(config: RunConfig, *, measure: bool = False) -> Answer:
    """Answer the settings of a run and an estimate of its memory, for which no weight is read.

    With `measure`, take real steps and correct the estimate by their peaks. The numbers are those
    by which the start of the run decides, and a run that it would refuse has the exit code 2.
    """
    environment, config = None, with_found_adapter(config)
    if isinstance(config, TrainConfig):
        find_algorithm(config.algorithm)
        environment, _ = find_task(config.task, config.run.seed)
    check_services(service_options(config))
    check_names(config)
    estimator = SizeEstimator(config, environment)
    size, folder = estimator.estimate(config), config.run.output or Path("runs")
    data: dict[str, Any] = {"config": plain_settings(config)}
    rows = [*_lengths_rows(config, size, data)]
    found, measured = list(find_problems(estimator, config, size, folder)), None
    refused = bool(found) and config.run.limits == "refuse"
    if measure and isinstance(config, TrainConfig) and not refused:
        measured = run_measured_steps(config, steps=1)
        data["measured"] = {**measured.lengths, "bytes": measured.peaks, "estimated": {}}
        if size.memory:
            data["measured"]["estimated"] = plan_step(config, measured.lengths).peaks
    rows += _memory_rows(size, data)
    if isinstance(config, TrainConfig) and environment and not has_turns(environment):
        apply_thread_option(config.model, workers=config.rollout.workers)
        rows.append(("time", str(time := estimator.plan_time(config))))
        data["estimated_seconds"] = round(time.seconds, 1)
        if advice := thread_advice(config.model, workers=config.rollout.workers):
            rows.append(("threads", advice))
    if environment and has_agent(environment) and not measured:
        rows.append(
            ("agent", "memory is that of one answer a rollout; add --measure to count them")
        )
    elif environment and has_turns(environment) and not measured:
        rows.append(("turns", "memory is that of one turn; several are not planned"))
    if measured:
        rows.append(("measured", _measured_text(measured)))
    data["fits"] = not found
    rows += _machine_rows(size, folder, data)
    rows += [("REFUSED" if refused else "warning", problem) for problem in found]
    text = f"{to_toml(config)}\n{table(rows)}\nno run was started"
    return Answer(data=data, text=text, exit_code=2 if refused else 0)


def _measured_text(measured: RealSteps) -> str:
    sizes = ", ".join(f"{size_text(peak)} in {name}" for name, peak in measured.peaks.items())
    lengths = measured.lengths
    seen = f"{lengths['prompt_tokens']} + {lengths['completion_tokens']} tokens"
    several = f" and {n} segments a rollout" if (n := lengths["segments"]) > 1 else ""
    return f"{sizes}, with up to {seen} of prompt and completion{several}"


def _lengths_rows(config: RunConfig, size: RunSize, data: dict[str, Any]) -> list[tuple[str, str]]:
    lengths = size.lengths
    if not isinstance(config, TrainConfig):
        longest = lengths.prompt + lengths.completion
        data["row_tokens"] = longest
        return [("rows", f"{lengths.read:,}, of up to {longest:,} tokens")]
    data |= {"prompt_tokens": lengths.prompt, "completion_tokens": lengths.completion}
    return [
        ("prompt", f"up to {lengths.prompt:,} tokens in {lengths.read:,} prompts"),
        ("completion", f"up to {lengths.completion:,} tokens"),
    ]


def _memory_rows(size: RunSize, data: dict[str, Any]) -> list[tuple[str, str]]:
    if size.memory is None:
        return [("memory", f"not known: {size.unknown}")]
    arrays = {name: size.memory.arrays[name].bytes for name in _SHOWN}
    rows = [(name, size_text(bytes_)) for name, bytes_ in arrays.items() if bytes_]
    measured = data.get("measured")
    for name, peak in size.peaks.items():
        factor = measured["bytes"][name] / measured["estimated"][name] if measured else 1.0
        note = f": {size_text(peak)} x {factor:.2f} as measured" if measured else ""
        rows.append((name, f"{size_text(factor * peak)} at its peak (estimated{note})"))
        data[_KEYS[name]] = round(factor * peak)
    return rows


def _machine_rows(size: RunSize, folder: Path, data: dict[str, Any]) -> list[tuple[str, str]]:
    free, memory = free_disk_bytes(folder), memory_bytes()
    data |= {"memory_bytes": size.memory_bytes, "machine_bytes": memory}
    data |= {"disk_bytes": size.disk_bytes, "free_disk_bytes": free}
    rows: list[tuple[str, str]] = []
    if size.workers:
        data |= {"workers": size.workers, "worker_bytes": size.worker_bytes}
        each = f"{size.workers} x {size_text(size.worker_bytes)} at their peak (estimated)"
        rows.append(("workers", f"{each}, each with its own copy of the base"))
    if size.completions:
        held = f"{size_text(size.rollout_bytes)} for {size.completions:,} at once"
        rows.append(("completions", held))
    return [
        *rows,
        ("machine", f"{size_text(memory)} of memory"),
        ("disk", f"about {size_text(size.disk_bytes)} written; {size_text(free)} free"),
    ]
