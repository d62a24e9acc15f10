"""A run of reinforcement learning: measured before and after, tracked, watched and resumable."""

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace

from textpolicy.algorithms import Algorithm
from textpolicy.config import TrainConfig, staleness_bound
from textpolicy.environments import Environment
from textpolicy.environments.training_rows import count_training_rows
from textpolicy.experiment.assembly import (
    Experiment,
    assemble,
    build_evaluator,
    checkpoints_of,
    find_algorithm,
    open_run_tracker,
    open_scorer,
)
from textpolicy.experiment.events import Measurement, Reporter, RunResult
from textpolicy.experiment.first_prompt import describe_prompt
from textpolicy.experiment.model_defaults import default_rate_of
from textpolicy.experiment.observer import MEASURED, StepObserver
from textpolicy.experiment.resuming import Start, save_options
from textpolicy.experiment.tasks import find_task
from textpolicy.experiment.watchdog import Watchdog, watch
from textpolicy.experiment.workers import NO_SWAP, open_crew
from textpolicy.loop import StepReport, train_rl
from textpolicy.planning.time_plan import TimePlan
from textpolicy.ranks import Ranks
from textpolicy.rewards import Scorer
from textpolicy.rollout.executors.executor import Executor
from textpolicy.rollout.executors.in_process import InProcessExecutor
from textpolicy.rollout.executors.ranks import RankedExecutor
from textpolicy.runs import RunDirectory
from textpolicy.tracking.alarm_advice import LearningSettings
from textpolicy.tracking.best import BestAdapter
from textpolicy.tracking.doubts import TIMES_SEEN, TRAINING_ROWS, find_doubts
from textpolicy.tracking.jsonl import read_metrics
from textpolicy.training.checkpoint import Checkpoint
from textpolicy.types import Metrics, Progress


def train_policy(
    config: TrainConfig,
    directory: RunDirectory,
    report: Reporter,
    start: Start | None = None,
    *,
    algorithm: Algorithm | None = None,
    prepare: Callable[[Experiment], None] | None = None,
) -> RunResult:
    """Measure, train, measure again; `start` says from where, by default from the beginning.

    `algorithm` replaces the one that the config names, and `prepare` may change the parts of the
    run before it starts.
    """
    start = start or Start(checkpoints=checkpoints_of(config, directory))
    algorithm = algorithm or start.parts.algorithm or find_algorithm(config.algorithm)
    environment, rewards = start.parts.task or find_task(config.task, config.run.seed)
    ranks = start.ranks
    experiment = assemble(config, environment, rewards, algorithm, directory, ranks)
    first_version = experiment.trainer.version
    if prepare:
        prepare(experiment)
    if start.resume:
        _restore_adapters(experiment, directory, start.resume, force=start.force)
    # A checkpoint that does not fit must leave the config as it was.
    save_options(config, directory, start)
    policy = experiment.policy
    if environment.agent is None:
        first, *others = environment.heldout(max(1, config.evaluation.count))
        tokens = policy.encode(first.asked)
        asked = [first.asked, *(task.asked for task in others)]
        report.note(describe_prompt(policy.tokenizer, tokens, policy.chat_template_kwargs, asked))
    report.step = start.resume.step if start.resume else 0
    with ExitStack() as opened:
        opened.callback(environment.close)
        scorer = open_scorer(experiment.reward, opened, report.note)
        executor: Executor = InProcessExecutor(policy, scorer)
        if config.rollout.swap == "tokens" and not config.rollout.workers_run_ahead:
            report.note(NO_SWAP)
        if config.rollout.workers:
            # They load their models while this process measures the policy.
            executor = opened.enter_context(closing(open_crew(config, directory, report.note)))
        watchdog = opened.enter_context(watch(config, directory, report))
        observer = _open_observer(
            experiment,
            config,
            opened,
            report,
            directory=directory,
            scorer=scorer,
            watchdog=watchdog,
            ranks=ranks,
            announced=start.parts.time,
        )
        started = time.perf_counter()
        report("start", f"resuming after step {report.step}" if start.resume else "training starts")
        before = _measure_before(observer, directory, start.resume, report.note)
        _train(
            experiment,
            config,
            start,
            scorer=scorer,
            executor=executor,
            observer=observer,
            watchdog=watchdog,
        )
        updates = experiment.trainer.version - first_version
        after = _measure_after(observer, experiment, config, directory, ranks)
    finished = observer.steps >= config.run.steps
    if not finished:
        watchdog.check_not_stalled()
    doubts = _find_doubts(directory) if after else ()
    for doubt in doubts:
        report("doubt", doubt)
    return RunResult(
        directory=directory,
        ended="alarm" if observer.stopped_by_alarm else "finished" if finished else "stopped",
        steps=observer.steps,
        updates=updates,
        seconds=time.perf_counter() - started,
        before=before,
        after=after,
        best=_best_measurement(observer, directory),
        alarms=(*observer.alarms, *watchdog.stalls),
        doubts=doubts,
        facts={"kept": observer.best.version} if observer.stopped_by_alarm else {},
    )


def _restore_adapters(
    experiment: Experiment, directory: RunDirectory, resume: Checkpoint, *, force: bool
) -> None:
    """Restore the trainer and the policy; they are measured before the loop restores the rest."""
    if force:
        resume.facts["tasks"].pop("seen", None)
    experiment.trainer.restore(resume.arrays, resume.facts["trainer"])
    experiment.policy.reload(experiment.trainer.published)
    directory.remove_adapters_after(experiment.trainer.version)


def _open_observer(
    experiment: Experiment,
    config: TrainConfig,
    opened: ExitStack,
    report: Reporter,
    *,
    directory: RunDirectory,
    scorer: Scorer,
    watchdog: Watchdog,
    ranks: Ranks,
    announced: TimePlan | None,
) -> StepObserver:
    tracker = open_run_tracker(
        config,
        directory,
        report.note,
        resume_step=report.step,
        sample_groups=config.run.sample_groups,
    )
    return StepObserver(
        directory,
        opened.enter_context(tracker),
        report,
        BestAdapter(
            experiment.adapters,
            directory.best,
            max_staleness=staleness_bound(
                config.rollout.max_staleness, config.rollout.steps_per_generation
            ),
        ),
        build_evaluator(experiment, scorer, config, opened, report.note, ranks),
        every=config.evaluation.every,
        stop_on_alarm=config.run.stop_on_collapse,
        watchdog=watchdog,
        keep_adapters=config.run.keep_adapters,
        held_out=config.evaluation.count,
        learning=LearningSettings(
            groups_per_step=config.rollout.groups_per_step,
            lr=config.trainer.lr,
            default_lr=default_rate_of(config.model),
            beta=config.algorithm.beta,
        ),
        announced=announced,
    )


def _train(
    experiment: Experiment,
    config: TrainConfig,
    start: Start,
    *,
    scorer: Scorer,
    executor: Executor,
    observer: StepObserver,
    watchdog: Watchdog,
) -> None:
    """Run the steps that are not done yet."""
    start.checkpoints.facts[MEASURED] = observer.facts
    watchdog.step_begins()
    if start.ranks.size > 1:
        executor = RankedExecutor(executor, start.ranks)
    train_rl(
        tasks=experiment.environment.stream(config.run.seed),
        reward=scorer,
        policy=experiment.policy,
        trainer=experiment.trainer,
        steps=config.run.steps,
        groups_per_step=config.rollout.groups_per_step,
        group_size=config.rollout.group_size,
        steps_per_generation=config.rollout.steps_per_generation,
        refill_rounds=experiment.refill_rounds,
        seed=config.run.seed,
        max_staleness=config.rollout.max_staleness,
        executor=executor,
        on_step=_on_step_of_ranks(observer, start.ranks),
        checkpoints=start.checkpoints,
        resume=start.resume,
    )
    watchdog.step_ended()


def _on_step_of_ranks(observer: StepObserver, ranks: Ranks) -> Callable[[StepReport], Progress]:
    """Return what observes a step. If one rank stops, all do: they take the same steps."""
    if ranks.size == 1:
        return observer.on_step

    def on_step(step: StepReport) -> Progress:
        waited = {"time/ranks": ranks.take_waited()}
        own = observer.on_step(replace(step, metrics=step.metrics | waited))
        return Progress.STOP if ranks.any(own is Progress.STOP) else Progress.MORE

    return on_step


def _measure_before(
    observer: StepObserver,
    directory: RunDirectory,
    resume: Checkpoint | None,
    note: Callable[[str], None],
) -> Measurement:
    """Return the measurement before the first step: a new one, or that in the checkpoint."""
    if resume is None:
        return observer.evaluate("before")
    rows = [row for row in read_metrics(directory.metrics) if row["step"] < resume.step]
    if lost := set(range(resume.step)) - {int(row["step"]) for row in rows}:
        # A full disk, a power failure or a person loses rows.
        note(
            f"{directory.metrics} has no rows of {len(lost)} steps, from step {min(lost)} on. They "
            "are lost; the run continues, because its checkpoint is whole"
        )
    return observer.restore(resume.facts[MEASURED], rows, resume.step)


def _measure_after(
    observer: StepObserver,
    experiment: Experiment,
    config: TrainConfig,
    directory: RunDirectory,
    ranks: Ranks,
) -> Measurement | None:
    """Return the measurement of the final adapters, or None if a listener stopped the run.

    The final adapters are the last ones, or the best ones after an alarm.
    """
    adapters, policy = experiment.adapters, experiment.policy
    if observer.stopped_by_alarm:
        # A rank that was resumed has no file of the best adapter.
        best = ranks.send_first(observer.best.path.read_bytes())
        if not ranks.is_first:
            observer.best.path.write_bytes(best)
        adapters.swap(observer.best.path)
        adapters.publish()
        policy.reload(experiment.trainer.published)
    elif not directory.latest.exists():
        # Each update publishes; without one, `textpolicy eval` still needs the file.
        adapters.publish()
    if observer.stopped_by_alarm or observer.steps >= config.run.steps:
        sampled = observer.steps * config.rollout.groups_per_step
        return observer.finish(policy.version, _data_metrics(experiment.environment, sampled))
    return None


def _data_metrics(environment: Environment, groups: int) -> Metrics:
    """Return how many rows the run trains on, and how often each, if its tasks are rows."""
    rows = count_training_rows(environment)
    return {TRAINING_ROWS: float(rows), TIMES_SEEN: groups / rows} if rows else {}


def _find_doubts(directory: RunDirectory) -> tuple[str, ...]:
    # Only the first rank keeps a file.
    return tuple(find_doubts(read_metrics(directory.metrics)))


def _best_measurement(observer: StepObserver, directory: RunDirectory) -> Measurement | None:
    """Return the value of the best adapter: its evaluation, or else its mean training reward."""
    value, step = observer.best.value, observer.best_step
    if value == float("-inf"):
        return None
    if not directory.best_is_measured:
        return Measurement(name="mean training reward", value=value, step=step)
    rows = read_metrics(directory.metrics) if directory.metrics.is_file() else []
    for row in rows:
        if row["step"] == step and row.get("eval/reward") == value:
            return observer.measurement_in(row)
    # The row of the evaluation was lost, and its standard error with it.
    return Measurement(name="greedy reward", value=value, step=step)
