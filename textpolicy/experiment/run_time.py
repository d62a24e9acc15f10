"""How long a run takes: the work that its config asks for, on this machine."""

from collections.abc import Callable, Mapping
from math import sqrt
from statistics import fmean
from typing import Any

import mlx.nn as nn

from textpolicy.config import TrainConfig
from textpolicy.device_sizes import sizes_of
from textpolicy.environments import Environment
from textpolicy.environments.chat import gold_for_turn
from textpolicy.experiment.assembly import adapter_config
from textpolicy.planning.adapter_plan import plan_adapters
from textpolicy.planning.time_plan import (
    StepWork,
    TimePlan,
    measure_speeds,
    plan_time,
    rows_to_measure,
    work_of,
)
from textpolicy.types import Prompt

_USUAL_TASKS = 16  # whose lengths are the usual ones


def plan_run_time(
    config: TrainConfig,
    network: nn.Module,
    architecture: Mapping[str, Any],
    *,
    usual: tuple[float, float],
    held_out: int,
    steps_done: int = 0,
) -> TimePlan:
    """Return the estimated time of the steps that are not done, by products that are timed now.

    `network` is the unloaded model of `architecture`, and `usual` what `usual_lengths` returns.
    """
    rollout, trainer, algorithm = config.rollout, config.trainer, config.algorithm
    (prompt, completion), limit = usual, config.sampling.max_tokens
    work = StepWork(
        groups=rollout.groups_per_step,
        group_size=rollout.group_size,
        prompt=prompt,
        completion=min(completion, limit) if limit else completion,
        held_out=held_out * (1 + config.evaluation.samples),
        adapter_weights=plan_adapters(network, adapter_config(config.adapter)).trainable_parameters,
        forwards=int(algorithm.beta > 0) + int(algorithm.old_logprobs == "fresh"),
        updates=trainer.epochs or 1,
        checkpoint_gradients=trainer.checkpoint_gradients,
    )
    sizes = sizes_of(config.sizes)
    return plan_time(
        work_of(network, architecture),
        work,
        measure_speeds(network, rows_to_measure(work, sizes)),
        sizes,
        steps=config.run.steps - steps_done,
        evaluations=_count_evaluations(config, steps_done),
    )


def usual_lengths(
    environment: Environment,
    encode: Callable[[Prompt], int],
    count: Callable[[str], int],
    most: int,
) -> tuple[float, float]:
    """Return the mean tokens of prompts, and a guess at those of completions.

    A model that has not learned a task writes more than the right answer needs. The guess is the
    geometric mean of what the right answer takes and of the limit `most`, or half of the limit.
    """
    tasks = environment.heldout(_USUAL_TASKS)
    prompts = fmean(encode(task.asked) for task in tasks)
    if environment.gold is None:
        return prompts, most / 2
    right = fmean(count(gold_for_turn(environment.gold(task.example), -1)) for task in tasks)
    return prompts, sqrt(min(right + 1, most) * most)


def _count_evaluations(config: TrainConfig, steps_done: int) -> int:
    """Return the measurements that follow: before, every so many steps, and after."""
    every = config.evaluation.every or config.run.steps
    between = (config.run.steps - 1) // every - steps_done // every
    return (steps_done == 0) + max(0, between) + 1
