"""Training steps that are measured and not kept: for `textpolicy bench` and --measure.

The steps are those of `textpolicy train`, with two differences. Every group has something to learn:
the user's rewards are called, and then replaced by 0 and 1 in turn. And the learning rate is so
small that the model barely changes during the measurement.
"""

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx

from textpolicy.cli.output import print_note
from textpolicy.config import TrainConfig, changed
from textpolicy.device_sizes import sizes_of, using_sizes
from textpolicy.environments import Environment
from textpolicy.experiment.assembly import assemble, find_algorithm
from textpolicy.experiment.run_size import agents_of
from textpolicy.experiment.tasks import find_task
from textpolicy.experiment.threads import apply_thread_option
from textpolicy.fast_cpu.bfloat16_copies import copied_bytes
from textpolicy.loop import StepReport, train_rl
from textpolicy.rewards import Rewards, Sample, Scorer, Verdict
from textpolicy.runs import RunDirectory
from textpolicy.training.batch import training_rows
from textpolicy.training.checkpoint import Checkpoints
from textpolicy.types import Metrics, Progress

_SETTINGS = {
    "trainer.lr": 1e-6,
    "trainer.schedule": "constant",
    "trainer.warmup": 0,
    "rollout.steps_per_generation": 1,
    "rollout.refill_rounds": 1,
}
_PEAKS = {"sampling": "memory/peak_generate_gb", "training": "memory/peak_train_gb"}


@dataclass(frozen=True, kw_only=True)
class RealSteps:
    """What was measured. `metrics` are means over the steps after the warm-up step.

    `lengths` are the most tokens of a segment before its first sampled token and from there on, and
    the most segments of a rollout.
    `peaks` are the most bytes in sampling and in training, less the bytes from before the steps.
    """

    environment: Environment
    steps: int
    warmed_up: bool
    metrics: Metrics
    lengths: Mapping[str, int]
    peaks: Mapping[str, int]


def run_measured_steps(config: TrainConfig, *, steps: int, seconds: float = math.inf) -> RealSteps:
    """Take a warm-up step and `steps` more, or as many as `seconds` allow, and measure them.

    If the first step takes all the time, it is the measured step. Adapters and checkpoints go to a
    temporary folder.
    """
    config = changed(config, _SETTINGS)
    bytes_before = mx.get_active_memory() + copied_bytes()
    apply_thread_option(config.model)
    algorithm = find_algorithm(config.algorithm)
    environment, rewards = find_task(config.task, config.run.seed)
    reports: list[StepReport] = []
    with TemporaryDirectory() as folder:
        directory = RunDirectory(Path(folder))
        experiment = assemble(config, environment, rewards, algorithm, directory)
        started = time.perf_counter()

        def see(report: StepReport) -> Progress:
            took, left = report.metrics["time/step"], seconds - (time.perf_counter() - started)
            print_note(f"{f'step {report.step}' if report.step else 'warm-up'}  {took:.2f} s")
            reports.append(report)
            return Progress.STOP if left < took else Progress.MORE

        with (
            using_sizes(sizes_of(config.sizes)),
            closing(environment),
            closing(
                SignalScorer(rewards, on_incident=lambda incident: print_note(str(incident)))
            ) as scorer,
        ):
            train_rl(
                tasks=environment.stream(config.run.seed),
                reward=scorer,
                policy=experiment.policy,
                trainer=experiment.trainer,
                steps=1 + steps,
                groups_per_step=config.rollout.groups_per_step,
                group_size=config.rollout.group_size,
                seed=config.run.seed,
                on_step=see,
                checkpoints=Checkpoints(directory.checkpoints, every=config.run.checkpoint_every),
            )
    kept = reports[1:] or reports
    names = set[str].intersection(*(set(report.metrics) for report in kept))
    values = {name: [report.metrics[name] for report in kept] for name in sorted(names)}
    trained = [row for report in kept for row in training_rows(report.trained)]
    return RealSteps(
        environment=environment,
        steps=len(kept),
        warmed_up=len(reports) > 1,
        metrics={name: statistics.fmean(all_) for name, all_ in values.items()},
        lengths={
            "prompt_tokens": max(row.prompt_length for row in trained),
            "completion_tokens": max(len(row.tokens) for row in trained),
            "segments": 1 + max(row.number for row in trained),
            **agents_of(config, environment),
        },
        peaks={name: round(1e9 * max(values[m])) - bytes_before for name, m in _PEAKS.items()},
    )


class SignalScorer(Scorer):
    """Calls the rewards, and then gives the samples of each task 0 and 1 in turn."""

    def __init__(self, rewards: Rewards, **options: Any) -> None:
        super().__init__(rewards, **options)
        self._signals: defaultdict[str, cycle[float]] = defaultdict(lambda: cycle((0.0, 1.0)))

    def score_prepared(self, samples: Sequence[Sample]) -> list[Verdict]:
        verdicts = zip(super().score_prepared(samples), samples, strict=True)
        return [replace(verdict, value=next(self._signals[one.id])) for verdict, one in verdicts]
