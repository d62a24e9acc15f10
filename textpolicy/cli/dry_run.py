"""Dry run: an estimate of a run's memory and time, and its settings, without starting the run."""

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from textpolicy.cli.answer import Answer, table
from textpolicy.cli.measured_steps import RealSteps, run_measured_steps
from textpolicy.config import TrainConfig, to_toml
from textpolicy.environments import Environment
from textpolicy.environments.chat import prompt_text
from textpolicy.errors import ConfigError
from textpolicy.experiment.assembly import (
    RunConfig,
    find_algorithm,
    plain_settings,
    service_options,
)
from textpolicy.experiment.model_defaults import low_rate_note
from textpolicy.experiment.paths import with_found_adapter
from textpolicy.experiment.preflight import check_names, find_problems, with_sizes_that_fit
from textpolicy.experiment.run_size import (
    RunSize,
    SizeEstimator,
    has_agent,
    has_turns,
    plan_step,
)
from textpolicy.experiment.tasks import find_task
from textpolicy.experiment.threads import apply_thread_option, thread_advice
from textpolicy.machine import free_disk_bytes, memory_bytes, size_text, with_busy_note
from textpolicy.tracking.open_tracker import check_services
from textpolicy.untrusted.terminal import shorten_line

_SHOWN = ("weights", "merged weights", "reference", "adapters", "optimizer")
_PROMPT_CHARACTERS = 100
_KEYS = {"sampling": "estimated_generation_bytes", "training": "estimated_training_bytes"}


def check_flags_of_plan(options: Namespace) -> None:
    """Raise ConfigError if a flag is given that only a dry run reads."""
    if options.all_settings and not options.dry_run:
        raise ConfigError(
            "--all-settings shows the settings of a dry run, and no dry run is asked for. Type "
            "--dry-run --all-settings, or leave out --all-settings: a run writes all its settings "
            "to config.toml"
        )


def show_plan(config: RunConfig, *, measure: bool = False, all_settings: bool = False) -> Answer:
    """Answer an estimate of a run, for which no weight is read, and the settings of the run.

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
    data: dict[str, Any] = {"config": plain_settings(config)}
    as_given, config = config, with_sizes_that_fit(config, estimator)
    size, folder = estimator.estimate(config), config.run.output or Path("runs")
    found, measured = list(find_problems(estimator, config, size, folder)), None
    refused = bool(found) and config.run.limits == "refuse"
    if measure and isinstance(config, TrainConfig) and not refused:
        measured = run_measured_steps(config, steps=1)
        data["measured"] = {**measured.lengths, "bytes": measured.peaks, "estimated": {}}
        if size.memory:
            data["measured"]["estimated"] = plan_step(config, measured.lengths).peaks
    data["fits"] = not found
    rows = [
        *_time_rows(config, estimator, environment, data),
        *_rate_rows(config),
        *_peak_rows(size, data),
        *_machine_rows(size, folder, data),
        _sizes_row(config, data),
        *_task_rows(config, size, environment, data),
        *_part_rows(size, data),
    ]
    if environment and not measured:
        rows += _rows_about_turns(environment)
    if measured:
        rows.append(("measured", _measured_text(measured)))
    rows += [("REFUSED" if refused else "warning", problem) for problem in found]
    text = f"{table(rows)}\n\n{_settings_text(as_given, all_settings)}\nno run was started"
    return Answer(data=data, text=text, exit_code=2 if refused else 0)


def _settings_text(config: RunConfig, all_settings: bool) -> str:
    if all_settings:
        return to_toml(config)
    chosen = ""
    if isinstance(config, TrainConfig) and config.model.name != "tiny":
        chosen = ", some of them by the size of the model"
    title = f"the settings that differ from the defaults{chosen}; --all-settings shows all:"
    return f"{title}\n\n{to_toml(config, only_changed=True)}"


def _time_rows(
    config: RunConfig,
    estimator: SizeEstimator,
    environment: Environment | None,
    data: dict[str, Any],
) -> list[tuple[str, str]]:
    """Return the estimated time of a run whose episodes have one turn each."""
    if not isinstance(config, TrainConfig) or environment is None or has_turns(environment):
        return []
    apply_thread_option(config.model, workers=config.rollout.workers)
    time = estimator.plan_time(config)
    data["estimated_seconds"] = round(time.seconds, 1)
    advice = thread_advice(config.model, workers=config.rollout.workers)
    return [("time", with_busy_note(str(time))), *([("threads", advice)] if advice else [])]


def _rate_rows(config: RunConfig) -> list[tuple[str, str]]:
    """Return a row about a learning rate with which the model would hardly learn."""
    low_rate = low_rate_note(config) if isinstance(config, TrainConfig) else None
    return [("rate", low_rate)] if low_rate else []


def _rows_about_turns(environment: Environment) -> list[tuple[str, str]]:
    if has_agent(environment):
        text = "memory is that of one answer a rollout; add --measure to count them"
        return [("agent", text)]
    if has_turns(environment):
        return [("turns", "memory is that of one turn; several are not planned")]
    return []


def _measured_text(measured: RealSteps) -> str:
    sizes = ", ".join(f"{size_text(peak)} in {name}" for name, peak in measured.peaks.items())
    lengths = measured.lengths
    seen = f"{lengths['prompt_tokens']} + {lengths['completion_tokens']} tokens"
    several = f" and {n} segments a rollout" if (n := lengths["segments"]) > 1 else ""
    return f"{sizes}, with up to {seen} of prompt and completion{several}"


def _task_rows(
    config: RunConfig, size: RunSize, environment: Environment | None, data: dict[str, Any]
) -> list[tuple[str, str]]:
    """Return how many tokens are trained on, and what the model is asked."""
    lengths = size.lengths
    if not isinstance(config, TrainConfig):
        longest = lengths.prompt + lengths.completion
        data["row_tokens"] = longest
        return [("rows", f"{lengths.read:,}, of up to {longest:,} tokens")]
    data |= {"prompt_tokens": lengths.prompt, "completion_tokens": lengths.completion}
    rollout = config.rollout
    each = f"{rollout.groups_per_step:,} prompts with {rollout.group_size:,} completions each"
    rows = [
        ("a step", each),
        ("prompt", f"up to {lengths.prompt:,} tokens in {lengths.read:,} prompts"),
        ("completion", f"up to {lengths.completion:,} tokens"),
    ]
    if environment and not has_agent(environment):
        (first,) = environment.heldout(1)
        asked = shorten_line(prompt_text(first.asked), _PROMPT_CHARACTERS)
        rows.append(("asked", f"{asked} (a held-out prompt)"))
    return rows


def _peak_rows(size: RunSize, data: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the memory that is needed at once, by phases of a step."""
    if size.memory is None:
        return [("memory", f"not known: {size.unknown}")]
    rows: list[tuple[str, str]] = []
    measured = data.get("measured")
    for name, peak in size.peaks.items():
        factor = measured["bytes"][name] / measured["estimated"][name] if measured else 1.0
        note = f": {size_text(peak)} x {factor:.2f} as measured" if measured else ""
        text = f"{size_text(factor * peak)} of memory at its peak (estimated{note})"
        rows.append((name, text))
        data[_KEYS[name]] = round(factor * peak)
    return rows


def _machine_rows(size: RunSize, folder: Path, data: dict[str, Any]) -> list[tuple[str, str]]:
    free, memory = free_disk_bytes(folder), memory_bytes()
    data |= {"memory_bytes": size.memory_bytes, "machine_bytes": memory}
    data |= {"disk_bytes": size.disk_bytes, "free_disk_bytes": free}
    return [
        ("machine", f"{size_text(memory)} of memory"),
        ("disk", f"about {size_text(size.disk_bytes)} written; {size_text(free)} free"),
    ]


def _sizes_row(config: RunConfig, data: dict[str, Any]) -> tuple[str, str]:
    """Return what the device computes at once, which the run would write into its config.toml."""
    data["sizes"] = asdict(config.sizes)
    return ("sizes", ", ".join(f"{name} {size:,}" for name, size in data["sizes"].items()))


def _part_rows(size: RunSize, data: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the parts of the memory: arrays, workers, and completions as Python objects."""
    arrays = size.memory.arrays if size.memory else {}
    sizes = {name: arrays[name].bytes for name in _SHOWN if name in arrays}
    rows = [(name, size_text(bytes_)) for name, bytes_ in sizes.items() if bytes_]
    if size.workers:
        data |= {"workers": size.workers, "worker_bytes": size.worker_bytes}
        each = f"{size.workers} x {size_text(size.worker_bytes)} at their peak (estimated)"
        rows.append(("workers", f"{each}, each with its own copy of the base"))
    if size.completions:
        held = f"{size_text(size.rollout_bytes)} for {size.completions:,} at once"
        rows.append(("completions", held))
    return rows
