"""`textpolicy bench`: training steps on the model at hand, timed, and advice out of the times.

The steps are those of `train`, with two differences: every group has something to learn, because 0
and 1 by turns stand in for what the user's reward says, which is called and timed all the same; and
the learning rate is next to nothing, so that the model answers the last step as it did the first.
"""

import os
import sys
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx

from textpolicy import fast_cpu
from textpolicy.algorithms import Algorithm
from textpolicy.cli.advice import Measured, advice_of, shown
from textpolicy.cli.answer import Answer
from textpolicy.cli.dry_run import memory_of, plays
from textpolicy.cli.flags import configured
from textpolicy.cli.probes import blas_speeds, product_speeds, width_speeds
from textpolicy.cli.timed_steps import TimedSteps
from textpolicy.config import TrainConfig, changed
from textpolicy.errors import ModelError
from textpolicy.experiment.assembly import (
    Experiment,
    apply_thread_option,
    assemble,
    find_algorithm,
    open_scorer,
)
from textpolicy.experiment.tasks import find_task
from textpolicy.loop import train_rl
from textpolicy.rewards import Rewards, Sample, Scorer, Verdict
from textpolicy.runs import RunDirectory
from textpolicy.tracking.console import Console
from textpolicy.training.logprobs import can_share_prompts

# The rest of the time goes to other widths of generation.
_FOR_STEPS = 0.7
_MANY = 1_000_000
_FIXED = {
    "trainer.lr": 1e-6,
    "trainer.schedule": "constant",
    "trainer.warmup": 0,
    "rollout.steps_per_generation": 1,
    "rollout.refill_rounds": 1,
}


def run(options: Namespace) -> Answer:
    config = changed(configured(TrainConfig(), options), _FIXED)
    if config.task.env is None and config.task.data is None:
        config = changed(config, {"task.env": "add"})
    apply_thread_option(config.model)
    with TemporaryDirectory() as folder, closing(Console(sys.stderr, _MANY)) as console:
        measured = measure(config, RunDirectory(Path(folder)), console, options.seconds)
    found = advice_of(measured)
    return Answer(
        data=asdict(measured) | {"shares": measured.shares, "advice": found},
        text=shown(measured, found),
    )


def measure(
    config: TrainConfig, directory: RunDirectory, console: Console, seconds: float
) -> Measured:
    """Everything that advice is made of."""
    algorithm = find_algorithm(config.algorithm)
    environment, rewards = find_task(config.task)
    experiment = assemble(config, environment, rewards, algorithm, directory)
    with ExitStack() as opened:
        scorer = open_scorer(experiment.reward, opened, console.note, kind=SignalScorer)
        started = time.perf_counter()
        steps = TimedSteps(
            _FOR_STEPS * seconds,
            thread_counts(),
            console.note,
            config.trainer.micro_batch_size,
            share_prompts=can_share_prompts(experiment.trainer.model),
        )
        _train(experiment, scorer, config, steps)
        left = seconds - (time.perf_counter() - started)
        widths = width_speeds(experiment, scorer, config.rollout, steps.metrics, left)
    trainer, rollout = experiment.trainer, config.rollout
    prompt, completion = steps.longest
    return Measured(
        model=config.model.name,
        task=environment.name,
        device=mx.default_device().type.name,
        groups=rollout.groups_per_step,
        group_size=rollout.group_size,
        max_tokens=experiment.policy.sampling.max_tokens,
        steps=steps.count,
        warmed_up=steps.warmed_up,
        metrics=steps.metrics,
        prompt_tokens=prompt,
        completion_tokens=completion,
        planned_bytes=(None if plays(environment) else planned_bytes(config, prompt, completion)),
        played=plays(environment),
        scores_reference=trainer.reference is not None and not _has_reference(algorithm),
        scores_afresh=trainer.old_logprobs == "fresh",
        isolated=rewards.timeout is not None,
        threads=steps.seconds_by_threads,
        widths=widths,
        products=product_speeds(trainer.model, rollout.groups_per_step * rollout.group_size),
        blas=blas_speeds(),
    )


class SignalScorer(Scorer):
    """Calls the rewards, and then gives the samples of each task 0 and 1 by turns."""

    def __init__(self, rewards: Rewards, **options: Any) -> None:
        super().__init__(rewards, **options)
        self._turns: defaultdict[str, cycle[float]] = defaultdict(lambda: cycle((0.0, 1.0)))

    def score_prepared(self, samples: Sequence[Sample]) -> list[Verdict]:
        verdicts = zip(super().score_prepared(samples), samples, strict=True)
        return [replace(verdict, value=next(self._turns[one.id])) for verdict, one in verdicts]


def thread_counts() -> list[int]:
    """Those of the matrix products now, and others worth trying; none where they cannot be set."""
    now = fast_cpu.enable().threads
    if now is None or mx.default_device().type != mx.cpu:
        return []
    return list(dict.fromkeys([now, 1, os.cpu_count() or 1]))


def planned_bytes(config: TrainConfig, prompt: int, completion: int) -> int | None:
    """The larger peak of the plan for the lengths that were seen; None if none can be made."""
    try:
        planned = memory_of(config, prompt_tokens=prompt, completion_tokens=completion)
    except ModelError:
        return None
    return max(planned.estimated_training_bytes, planned.estimated_generation_bytes)


def _has_reference(algorithm: Algorithm) -> bool:
    """Whether the algorithm has one of itself, whatever the options are."""
    return algorithm.declaration.needs_teacher or "reference" in algorithm.trainer


def _train(experiment: Experiment, scorer: Scorer, config: TrainConfig, steps: TimedSteps) -> None:
    try:
        train_rl(
            tasks=experiment.environment.stream(config.run.seed),
            reward=scorer,
            policy=experiment.policy,
            trainer=experiment.trainer,
            steps=_MANY,
            groups_per_step=config.rollout.groups_per_step,
            group_size=config.rollout.group_size,
            seed=config.run.seed,
            on_step=steps.see,
        )
    finally:
        steps.put_threads_back()
