"""The training loop: task -> rollout -> buffer -> trainer -> adapters on disk -> reload -> rollout.

Read this file to see what a run does. The imports name the files with the details.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from textpolicy.buffer import Buffer
from textpolicy.machine import keep_memory_in_bounds
from textpolicy.resume import begin_run, make_checkpoint, restore_checkpoint
from textpolicy.rewards import RewardLike, scorer_of
from textpolicy.rollout.executors.executor import Executor
from textpolicy.rollout.executors.in_process import InProcessExecutor, reload_policy
from textpolicy.rollout.feed import FeedOptions, RolloutFeed
from textpolicy.rollout.task_source import TaskSource
from textpolicy.tracking.rollout_metrics import staleness_metrics
from textpolicy.tracking.step_timer import StepTimer
from textpolicy.training.background_saving import BackgroundSaver
from textpolicy.training.checkpoint import Checkpoint, Checkpoints
from textpolicy.training.trainer import Trainer
from textpolicy.types import Metrics, Policy, Progress, RolloutGroup, Task, asks_to_stop


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did. `on_step` receives it when the step is finished.

    The sampling of `groups` was completed in this step, and `trained` were trained on.
    `advantages` are those of `trained`, by group and member; None means that the rollout was not
    trained on.
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
    executor: Executor | None = None,
    max_staleness: int | None = None,
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

    Without `executor`, `policy` and `reward` sample and score in this process. The workers of an
    executor may run ahead: no group is trained on that is more than `max_staleness` versions old,
    which is `steps_per_generation - 1` by default. The caller closes the executor.

    A checkpoint is made after `on_step` and at the end, and is written while the next step samples.
    With `resume`, the run continues from that checkpoint and computes the numbers that an
    uninterrupted run computes, if all other arguments are the same and `tasks` starts from its
    beginning.
    """
    options = FeedOptions(
        steps=steps,
        groups_per_step=groups_per_step,
        group_size=group_size,
        steps_per_generation=steps_per_generation,
        refill_rounds=refill_rounds,
        max_staleness=max_staleness,
        seed=seed,
    )
    buffer = Buffer(options.staleness)
    metrics: Metrics = {}
    saver = BackgroundSaver(checkpoints)
    with scorer_of(reward) as scorer, keep_memory_in_bounds(), saver:
        feed = RolloutFeed(
            TaskSource(tasks), executor or InProcessExecutor(policy, scorer), buffer, options
        )
        if resume:
            first = restore_checkpoint(resume, trainer, policy, feed, scorer)
        else:
            first = begin_run(trainer, feed)
        timer = StepTimer()
        for step in range(first, steps):
            arrived = feed.fill(step, trainer.version)
            timer.record("wait" if feed.in_background else "generate")
            if saver.wait():
                timer.record("checkpoint")

            trained = buffer.take(trainer.version, groups_per_step)
            staleness = staleness_metrics(trained, trainer.version)
            metrics = trainer.train(trained) | staleness
            timer.record("train")

            if policy.version != trainer.version:
                feed.follow(trainer.version, trainer.published)
                reload_policy(policy, trainer.version, trainer.published)
            timer.record("reload")

            metrics |= timer.metrics(reward_seconds=arrived.reward_seconds) | arrived.metrics
            metrics |= feed.metrics() | {"version": float(trainer.version)}
            report = StepReport(
                step=step,
                steps=steps,
                metrics=metrics,
                groups=arrived.groups,
                trained=trained,
                advantages=trainer.advantages,
            )
            stop = on_step is not None and asks_to_stop(on_step(report), "on_step")
            # `on_step` has written this step's metrics: the next step's have the time of saving.
            timer = StepTimer()
            if saver.due(step + 1, last=stop or step + 1 == steps):
                saver.save(make_checkpoint(step + 1, trainer, feed, scorer))
                timer.record("checkpoint")
            if stop:
                break
    return metrics
