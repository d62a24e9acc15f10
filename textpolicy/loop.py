"""The circle: task -> rollout -> buffer -> trainer -> adapters on disk -> reload -> rollout ...

Read this to see how a run goes; everything it calls is in the folder of the same name.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from textpolicy.buffer import Buffer
from textpolicy.errors import TrainingError
from textpolicy.resume import make_checkpoint, restore_checkpoint
from textpolicy.rewards import RewardLike, Scorer, scorer_of
from textpolicy.rollout.dynamic_sampling import SampledGroups, collect_with_dynamic_sampling
from textpolicy.rollout.task_source import TaskSource
from textpolicy.tracking.rollout_metrics import rollout_metrics, staleness_metrics
from textpolicy.training.checkpoint import Checkpoint, Checkpoints
from textpolicy.training.trainer import Trainer
from textpolicy.training.wired_memory import wired_memory
from textpolicy.types import Metrics, Policy, Progress, RolloutGroup, Task, asks_to_stop


@dataclass(frozen=True, slots=True)
class StepReport:
    """One finished step, for whoever watches the run.

    `groups` were sampled in it, and `trained` learned from, with these `advantages` by group and
    member; None is a rollout that was not learned from.
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
    """Train for `steps` steps and return the last one's metrics.

    The trainer publishes adapters to the file its set-up names, and the policy reloads that file
    before its next generation: both may live on shared copies of one model, or in different
    processes. With `steps_per_generation` above 1, rollouts for several steps are sampled at once.
    With `refill_rounds` above 1, groups whose rewards are all equal are replaced by others, in at
    most so many rounds of sampling. Tasks that are a `Curriculum` are told how they went. The run
    ends early when `on_step` answers `Progress.STOP`.

    `checkpoints` are saved after `on_step`, and at the end of the run. `resume` goes on from one
    to the same numbers, given the arguments of before and tasks that begin anew.
    """
    source, buffer = TaskSource(tasks), Buffer(max_staleness=steps_per_generation - 1)
    metrics: Metrics = {}
    with scorer_of(reward) as scorer, wired_memory():
        first = restore_checkpoint(resume, trainer, policy, source, buffer, scorer) if resume else 0
        timer = _StepTimer(scorer)
        for step in range(first, steps):
            sampled: SampledGroups | None = None
            if not buffer:
                sampled = collect_with_dynamic_sampling(
                    source.take,
                    policy,
                    scorer,
                    groups=groups_per_step * steps_per_generation,
                    group_size=group_size,
                    seeds=lambda done, step=step: (seed << 32) + (done << 24) + step,
                    rounds=refill_rounds,
                )
                buffer.extend(sampled.kept)
                source.observe(sampled.sampled)
            timer.mark("generate")

            trained = buffer.take(trainer.version, groups_per_step)
            staleness = staleness_metrics(trained, trainer.version)
            metrics = trainer.train(trained) | staleness
            timer.mark("train")

            if policy.version != trainer.version:
                _reload(policy, trainer)
            timer.mark("reload")

            metrics |= timer.metrics() | {"version": float(trainer.version)}
            metrics |= _sampling_metrics(sampled, metrics["time/generate"])
            report = StepReport(
                step=step,
                steps=steps,
                metrics=metrics,
                groups=sampled.sampled if sampled else (),
                trained=trained,
                advantages=trainer.advantages,
            )
            stop = on_step is not None and asks_to_stop(on_step(report))
            # The row of this step is written, as the checkpoint has it: saving counts to the next.
            timer = _StepTimer(scorer)
            if checkpoints and (stop or step + 1 == steps or checkpoints.due(step + 1)):
                checkpoints.save(make_checkpoint(step + 1, trainer, source, buffer, scorer))
                timer.mark("checkpoint")
            if stop:
                break
    return metrics


def _sampling_metrics(sampled: SampledGroups | None, seconds: float) -> Metrics:
    """What was sampled in a step; nothing, where it trained on what was sampled before."""
    if sampled is None:
        return {}
    metrics = rollout_metrics(sampled.sampled) | sampled.metrics
    return metrics | {"tokens_per_second": metrics["num_tokens"] / seconds}


class _StepTimer:
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


def _reload(policy: Policy, trainer: Trainer) -> None:
    policy.reload(trainer.published)
    if policy.version != trainer.version:
        raise TrainingError(
            f"the policy still generates with version {policy.version} after reloading "
            f"{trainer.published}; expected version {trainer.version}"
        )
