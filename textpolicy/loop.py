"""The circle: task -> rollout -> buffer -> trainer -> adapters on disk -> reload -> rollout ...

Read this to see how a run goes; everything it calls is in the folder of the same name.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import mlx.core as mx

from textpolicy.buffer import Buffer
from textpolicy.errors import TaskError, TrainingError
from textpolicy.rewards import Scorer, Scoring, scorer_of
from textpolicy.rollout.refill import collect_with_signal
from textpolicy.tracking.rollout_metrics import rollout_metrics
from textpolicy.training.trainer import Trainer
from textpolicy.types import Curriculum, Metrics, Policy, Progress, RolloutGroup, Task


@dataclass(frozen=True, slots=True)
class StepReport:
    """One finished step, for whoever watches the run."""

    step: int
    steps: int
    metrics: Metrics
    groups: Sequence[RolloutGroup]


def train_rl(
    *,
    tasks: Iterable[Task],
    reward: Scoring,
    policy: Policy,
    trainer: Trainer,
    steps: int,
    groups_per_step: int = 16,
    group_size: int = 8,
    refill_rounds: int = 1,
    seed: int = 0,
    on_step: Callable[[StepReport], Progress | None] | None = None,
) -> Metrics:
    """Train for `steps` steps and return the last one's metrics.

    The trainer publishes adapters to the file its set-up names, and the policy reloads that file
    before its next generation: both may live on twins of one model, or in different processes.
    With `refill_rounds` above 1, groups whose rewards are all equal are replaced by others, in at
    most so many rounds of sampling. Tasks that are a `Curriculum` are told how they went. The run
    ends early when `on_step` answers `Progress.STOP`.
    """
    buffer = Buffer()
    source = iter(tasks)
    metrics: Metrics = {}
    with scorer_of(reward) as scorer:
        for step in range(steps):
            laps = _Laps(scorer)
            collected = collect_with_signal(
                lambda count, step=step: _next_tasks(source, count, step, steps),
                policy,
                scorer,
                groups=groups_per_step,
                group_size=group_size,
                seeds=lambda done, step=step: (seed << 32) + (done << 24) + step,
                rounds=refill_rounds,
            )
            buffer.extend(collected.kept)
            if isinstance(source, Curriculum):
                source.observe(collected.sampled)
            laps.mark("generate")

            metrics = trainer.train(buffer)
            laps.mark("train")

            if policy.version != trainer.version:
                _reload(policy, trainer)
            laps.mark("reload")

            metrics |= rollout_metrics(collected.sampled) | collected.metrics | laps.metrics()
            metrics["version"] = float(trainer.version)
            metrics["tokens_per_second"] = metrics["num_tokens"] / metrics["time/generate"]
            report = StepReport(step, steps, metrics, collected.sampled)
            if on_step and on_step(report) is Progress.STOP:
                break
    return metrics


class _Laps:
    """Where a step's time goes, rewards apart from generation, and the most memory it takes."""

    def __init__(self, scorer: Scorer) -> None:
        mx.reset_peak_memory()
        self._scorer = scorer
        self._scored = scorer.seconds
        self._started = self._last = time.perf_counter()
        self._seconds: Metrics = {}

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self._seconds[f"time/{name}"] = now - self._last
        self._last = now

    def metrics(self) -> Metrics:
        reward = self._scorer.seconds - self._scored
        return self._seconds | {
            "time/generate": self._seconds["time/generate"] - reward,
            "time/reward": reward,
            "time/step": self._last - self._started,
            "memory/peak_gb": mx.get_peak_memory() / 1e9,
        }


def _next_tasks(tasks: Iterator[Task], count: int, step: int, steps: int) -> list[Task]:
    batch = list(islice(tasks, count))
    if len(batch) < count:
        raise TaskError(
            f"the tasks ran out at step {step} of {steps}, which needs {count} and got "
            f"{len(batch)}: pass a longer list, or an iterator without end such as "
            "itertools.cycle(tasks)"
        )
    return batch


def _reload(policy: Policy, trainer: Trainer) -> None:
    policy.reload(trainer.published)
    if policy.version != trainer.version:
        raise TrainingError(
            f"the policy still generates with version {policy.version} after reloading "
            f"{trainer.published}; expected version {trainer.version}"
        )
