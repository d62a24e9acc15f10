"""The training loop: task -> rollout -> buffer -> trainer -> adapters on disk -> reload -> rollout.

Read this file to see what a run does. The imports name the files with the details.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from textpolicy.buffer import Buffer
from textpolicy.errors import TrainingError
from textpolicy.machine import keep_memory_in_bounds
from textpolicy.resume import make_checkpoint, restore_checkpoint
from textpolicy.rewards import RewardLike, Scorer, scorer_of
from textpolicy.rollout.dynamic_sampling import SampledGroups, collect_with_dynamic_sampling
from textpolicy.rollout.task_source import TaskSource
from textpolicy.tracking.rollout_metrics import rollout_metrics, staleness_metrics
from textpolicy.training.checkpoint import Checkpoint, Checkpoints
from textpolicy.training.trainer import Trainer
from textpolicy.types import Metrics, Policy, Progress, RolloutGroup, Task, asks_to_stop


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did. `on_step` receives it when the step is finished.

    `groups` were sampled in this step, and `trained` were trained on. `advantages` are those of
    `trained`, by group and member; None means that the rollout was not trained on.
    """

    step: int
    steps: int
    metrics: Metrics
    groups: Sequence[RolloutGroup]
    trained: Sequence[RolloutGroup]
    advantages: Sequence[Sequence[float | None]]


def train_rl(
    *,
    tasks: Iterable[Task],
    reward: RewardLike,
    policy: Policy,
    trainer: Trainer,
    steps: int,
    groups_per_step: int = 16,
    group_size: int = 8,
    steps_per_generation: int = 1,
    refill_rounds: int = 1,
    seed: int = 0,
    on_step: Callable[[StepReport], Progress | None] | None = None,
    checkpoints: Checkpoints | None = None,
    resume: Checkpoint | None = None,
) -> Metrics:
    """Train for `steps` steps and return the metrics of the last step.

    The trainer publishes adapters to a file, and the policy reloads that file before the next
    generation. Trainer and policy may share one base model. One generation samples the rollouts of
    `steps_per_generation` steps. With `refill_rounds` above 1, groups whose rewards are all equal
    are replaced, in at most that many rounds of sampling. A `Curriculum` as `tasks` receives the
    sampled groups. The run ends early if `on_step` returns `Progress.STOP`.

    A checkpoint is saved after `on_step` and at the end. With `resume`, the run continues from
    that checkpoint and computes the numbers that an uninterrupted run computes, if all other
    arguments are the same and `tasks` starts from its beginning.
    """
    source, buffer = TaskSource(tasks), Buffer(max_staleness=steps_per_generation - 1)
    metrics: Metrics = {}
    with scorer_of(reward) as scorer, keep_memory_in_bounds():
        first = restore_checkpoint(resume, trainer, policy, source, buffer, scorer) if resume else 0
        timer = _StepTimer(scorer)
        for step in range(first, steps):
            sampled: SampledGroups | None = None
            if not buffer:
                sampled = collect_with_dynamic_sampling(
                    source.next_tasks,
                    policy,
                    scorer,
                    groups=groups_per_step * steps_per_generation,
                    group_size=group_size,
                    round_seed=lambda number, step=step: (seed << 32) + (number << 24) + step,
                    rounds=refill_rounds,
                )
                buffer.extend(sampled.kept)
                source.observe(sampled.groups)
            timer.record("generate")

            trained = buffer.take(trainer.version, groups_per_step)
            staleness = staleness_metrics(trained, trainer.version)
            metrics = trainer.train(trained) | staleness
            timer.record("train")

            if policy.version != trainer.version:
                _reload_policy(policy, trainer)
            timer.record("reload")

            metrics |= timer.metrics() | {"version": float(trainer.version)}
            metrics |= _sampling_metrics(sampled, metrics["time/generate"])
            report = StepReport(
                step=step,
                steps=steps,
                metrics=metrics,
                groups=sampled.groups if sampled else (),
                trained=trained,
                advantages=trainer.advantages,
            )
            stop = on_step is not None and asks_to_stop(on_step(report))
            # `on_step` has written this step's metrics: the next step's have the time of saving.
            timer = _StepTimer(scorer)
            if checkpoints and (stop or step + 1 == steps or checkpoints.due(step + 1)):
                checkpoints.save(make_checkpoint(step + 1, trainer, source, buffer, scorer))
                timer.record("checkpoint")
            if stop:
                break
    return metrics


def _sampling_metrics(sampled: SampledGroups | None, seconds: float) -> Metrics:
    """Return the metrics of the sampled groups, or none if the step sampled nothing."""
    if sampled is None:
        return {}
    metrics = rollout_metrics(sampled.groups) | sampled.metrics
    return metrics | {"tokens_per_second": metrics["num_tokens"] / seconds}


class _StepTimer:
    """Measures the time and the peak memory of each phase of a step, rewards included."""

    def __init__(self, scorer: Scorer) -> None:
        mx.reset_peak_memory()
        self._scorer = scorer
        self._scored = scorer.seconds
        self._started = self._last = time.perf_counter()
        self._seconds: Metrics = {}
        self._peaks: dict[str, float] = {}

    def record(self, name: str) -> None:
        """Record the time and the peak since the last phase ended as those of phase `name`."""
        now = time.perf_counter()
        self._seconds[f"time/{name}"] = now - self._last
        self._last = now
        self._peaks[name] = mx.get_peak_memory() / 1e9
        mx.reset_peak_memory()

    def metrics(self) -> Metrics:
        reward = self._scorer.seconds - self._scored
        return self._seconds | {
            "time/generate": self._seconds["time/generate"] - reward,
            "time/reward": reward,
            "time/step": self._last - self._started,
            "memory/peak_gb": max(self._peaks.values()),
            "memory/peak_generate_gb": self._peaks["generate"],
            "memory/peak_train_gb": self._peaks["train"],
        }


def _reload_policy(policy: Policy, trainer: Trainer) -> None:
    policy.reload(trainer.published)
    if policy.version != trainer.version:
        raise TrainingError(
            f"the policy still generates with version {policy.version} after reloading "
            f"{trainer.published}; expected version {trainer.version}. Make the policy's reload() "
            "load that file and return its version"
        )
