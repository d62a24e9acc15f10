"""What is checked before a run loads anything: names, packages, lengths, memory and disk space."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from textpolicy.config import SFTConfig, TrainConfig, changed
from textpolicy.config.train import NO_RAY
from textpolicy.device_sizes import DeviceSizes, device_sizes
from textpolicy.environments import Environment
from textpolicy.errors import ConfigError, PromptError
from textpolicy.experiment.assembly import RunConfig, adapter_config, service_options
from textpolicy.experiment.run_size import RunSize, SizeEstimator, has_turns
from textpolicy.generation.model_files import find_model
from textpolicy.machine import free_disk_bytes, memory_bytes, size_text, with_busy_note
from textpolicy.planning.time_plan import TimePlan
from textpolicy.tracking.open_tracker import check_services
from textpolicy.training.sft import SFTData

_OVERRIDE = "To start the run all the same, add --limits warn"


def check_before_start(
    config: RunConfig,
    environment: Environment | None,
    folder: Path,
    note: Callable[[str], None],
    *,
    written: int = 0,
    steps_done: int = 0,
    processes: int = 1,
) -> tuple[RunConfig, SFTData | None, TimePlan | None]:
    """Raise an error about whatever would end the run later; no weight is read, nothing sampled.

    Return the config with the sizes of the run, the rows of a supervised run, which are read on the
    way, and the time that is announced for a run with rewards. `folder` is where the run will
    write, and `written` are the bytes that it has written there. `note` gets warnings, the problems
    that `run.limits = "warn"` allows, and how long the steps after `steps_done` take. `processes`
    is the number of ranks on this machine, each of which needs the memory of the run.
    """
    check_services(service_options(config), note)
    check_names(config)
    estimator = SizeEstimator(config, environment)
    config = with_sizes_that_fit(config, estimator, processes=processes)
    size = estimator.estimate(config)
    problems = find_problems(estimator, config, size, folder, written=written)
    for problem in (*problems, *ranks_problem(size, processes)):
        if config.run.limits == "refuse":
            raise ConfigError(f"{problem}. {_OVERRIDE}")
        note(f"{problem}. The run starts all the same, because of --limits warn")
    plan = _plan_time(estimator, config, environment, steps_done)
    if plan is not None:
        note(f"the run takes {with_busy_note(str(plan))}")
    return config, estimator.data, plan


def with_sizes_that_fit(
    config: RunConfig, estimator: SizeEstimator, *, processes: int = 1
) -> RunConfig:
    """Return the config with a number for each size of [sizes] that was not set.

    The numbers are those of the device. They are halved while the run, by the estimate, needs more
    memory than the machine has for each of its `processes`, but not below the sizes of a CPU.
    """
    sizes, set_before = device_sizes(), asdict(config.sizes)

    def filled(sizes: DeviceSizes) -> RunConfig:
        chosen = asdict(sizes)
        free = {f"sizes.{name}": chosen[name] for name, set_ in set_before.items() if set_ is None}
        return changed(config, free)

    while sizes != sizes.halved:
        if processes * estimator.estimate(filled(sizes)).memory_bytes <= memory_bytes():
            break
        sizes = sizes.halved
    return filled(sizes)


def ranks_problem(size: RunSize, processes: int) -> Iterator[str]:
    """Yield why several ranks do not fit on this machine, if one would."""
    if processes > 1 and size.memory_bytes <= memory_bytes() < processes * size.memory_bytes:
        yield (
            f"each of {processes} ranks on this machine needs about {size_text(size.memory_bytes)} "
            f"of memory with its own copy of the base, and the machine has "
            f"{size_text(memory_bytes())} for them. Start fewer ranks here"
        )


def _plan_time(
    estimator: SizeEstimator,
    config: RunConfig,
    environment: Environment | None,
    steps_done: int,
) -> TimePlan | None:
    """Return how long the rest of a run takes, or None if that is not known before it starts."""
    if isinstance(config, SFTConfig) or environment is None or has_turns(environment):
        return None
    return estimator.plan_time(config, steps_done)


def check_names(config: RunConfig) -> None:
    """Raise an error if the model, the adapters or the adapter config that are named are absent."""
    find_model(config.model.name)
    start = config.adapter.start
    if start and not start.exists():
        raise ConfigError(f"there are no adapters at {start}. Name a file, or a folder with one")
    if start is None:
        dropout = adapter_config(config.adapter).dropout
        if dropout and isinstance(config, TrainConfig):
            name = config.adapter.config or "adapter.dropout (--dropout)"
            raise ConfigError(
                f"the adapter dropout is {dropout}, from {name}; reinforcement learning needs 0, "
                "because the trainer computes log-probabilities with the network that sampled, and "
                "dropout makes another network of each call. Remove the dropout"
            )


def find_problems(
    estimator: SizeEstimator, config: RunConfig, size: RunSize, folder: Path, *, written: int = 0
) -> Iterator[str]:
    """Yield why the run cannot work on this machine: its memory, then its disk space.

    Raise an error if no machine could run it.
    """
    check_context(size)
    if isinstance(config, TrainConfig):
        estimator.check_merging(config)
    if size.memory_bytes > memory_bytes():
        room = free_disk_bytes(folder) + written
        yield f"{_memory_text(config, size)}. {_what_fits(estimator, config, size, room)}"
    yield from disk_problems(config, size, folder, written=written)


def disk_problems(config: RunConfig, size: RunSize, folder: Path, *, written: int) -> Iterator[str]:
    """Yield why the disk of `folder` is too small for what the run has still to write."""
    free = free_disk_bytes(folder)
    has = f"the disk of {folder} has {size_text(free)} free"
    if free + written < size.needed_disk_bytes:
        yield (
            f"{has}, and the run needs at least {size_text(size.needed_disk_bytes)} for "
            f"{size.checkpoints + 1:,} checkpoints and its adapters. Free some space, or name "
            "another disk by --output"
        )
    elif free + written < size.disk_bytes:
        rows = {"samples.jsonl": size.samples_bytes, "metrics.jsonl": size.steps_bytes}
        largest = max(rows, key=rows.__getitem__)
        less = ". --sample-groups 0 writes no samples" if largest == "samples.jsonl" else ""
        yield (
            f"the run would write about {size_text(size.disk_bytes - written)}, by an estimate, of "
            f"which up to {size_text(rows[largest])} in {largest}; {has}. Free some space, name "
            f"another disk by --output, or give fewer steps{less}"
        )


def check_context(size: RunSize) -> None:
    """Raise `PromptError` if the longest prompt and a completion do not fit the model's context."""
    lengths = size.lengths
    if lengths.context and lengths.prompt + lengths.completion > lengths.context:
        raise PromptError(
            f"the longest prompt has {lengths.prompt:,} tokens and a completion up to "
            f"{lengths.completion:,}, and the model's context holds {lengths.context:,} tokens. "
            "Shorten the prompt, lower --max-tokens, or use a model with a longer context"
        )


def _memory_text(config: RunConfig, size: RunSize) -> str:
    parts = [f"{size_text(peak)} at the peak of {name}" for name, peak in size.peaks.items()]
    if isinstance(config, TrainConfig):
        parts.append(
            f"{size_text(size.rollout_bytes)} to hold {size.completions:,} completions of up to "
            f"{size.lengths.prompt:,} + {size.lengths.completion:,} tokens"
        )
    if size.workers:
        parts.append(
            f"{size_text(size.workers * size.worker_bytes)} of {size.workers} rollout workers, "
            "each with its own copy of the base"
        )
    return (
        f"the run needs about {size_text(size.memory_bytes)} of memory, and this machine has "
        f"{size_text(memory_bytes())} for it. The estimate: {', '.join(parts)}"
    )


def _what_fits(estimator: SizeEstimator, config: RunConfig, size: RunSize, room: float) -> str:
    """Return in words the mildest changes with which the run fits, or that none was found.

    `room` are the bytes that the run may write.
    """
    if size.memory and (weights := size.memory.arrays["weights"].bytes) > memory_bytes():
        return (
            f"The weights alone take {size_text(weights)}. Choose a smaller model, or quantize the "
            "base: --quantize 4"
        )
    given: dict[str, Any] = {}
    for change in _milder(config):
        given |= change
        if _fits(estimator, config, given, room):
            # Changes that alone were too little may not be needed beside the last one.
            for key in list(given)[:-1]:
                without = {other: value for other, value in given.items() if other != key}
                given = without if _fits(estimator, config, without, room) else given
            return f"This would fit: {' '.join(_flag(key, value) for key, value in given.items())}"
    if room < math.inf:
        # Its length makes the run too large for the disk, whatever a step takes.
        return _what_fits(estimator, config, size, math.inf)
    return "No smaller step fits either. Choose a smaller model, or a machine with more memory"


def _fits(estimator: SizeEstimator, config: RunConfig, given: dict[str, Any], room: float) -> bool:
    size = estimator.estimate(changed(config, given))
    return size.memory_bytes <= memory_bytes() and size.disk_bytes <= room


def _milder(config: RunConfig) -> Iterator[dict[str, Any]]:
    """Yield changes of settings that take less memory, one after the other."""
    if not config.trainer.checkpoint_gradients:
        yield {"trainer.checkpoint_gradients": True}
    if isinstance(config, SFTConfig):
        yield from _halved("trainer.batch_size", config.trainer.batch_size, 1)
        return
    if config.sampling.merge_adapters:
        yield {"sampling.merge_adapters": False}
    if (config.trainer.micro_batch_size or 2) > 1:
        yield {"trainer.micro_batch_size": 1}
    least_workers = 0 if config.rollout.ray == NO_RAY else 1
    yield from _halved("rollout.workers", config.rollout.workers_here, least_workers)
    yield from _halved("rollout.steps_per_generation", config.rollout.steps_per_generation, 1)
    yield from _halved("evaluation.samples", config.evaluation.samples, 1)
    yield from _halved("evaluation.count", config.evaluation.count, 512)
    yield from _halved("rollout.groups_per_step", config.rollout.groups_per_step, 1)
    yield from _halved("rollout.group_size", config.rollout.group_size, 2)


def _halved(key: str, value: int, least: int) -> Iterator[dict[str, Any]]:
    while value > least:
        value = max(least, value // 2)
        yield {key: value}


def _flag(key: str, value: Any) -> str:
    names = {"evaluation.count": "count", "evaluation.samples": "eval_samples"}
    name = names.get(key, key.rpartition(".")[2])
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {value}"
