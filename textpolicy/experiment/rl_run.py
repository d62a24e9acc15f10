"""A run from its config to two numbers, before and after. `train` and `demo` are this file with
different configs; what it is made of is in `assembly`.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass

from textpolicy.algorithms import Algorithm
from textpolicy.backend import versions
from textpolicy.config import TrainConfig, to_toml
from textpolicy.errors import DataError
from textpolicy.evaluation import Evaluator, HeldOut, MeanReward
from textpolicy.experiment.assembly import Experiment, assemble, find_algorithm, sampling_of
from textpolicy.experiment.observer import Observer
from textpolicy.experiment.recording import tracker_of
from textpolicy.experiment.signals import StopRequest, stopping
from textpolicy.experiment.tasks import elsewhere, find_task
from textpolicy.loop import StepReport, train_rl
from textpolicy.rewards import Incident, Rewards, Scorer
from textpolicy.runs import RunDirectory, claim
from textpolicy.tracking.best import BestAdapter
from textpolicy.tracking.console import Console, terminal_safe
from textpolicy.tracking.jsonl import read_metrics
from textpolicy.training.checkpoint import Checkpoint, Checkpoints
from textpolicy.types import Progress


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run achieved. `seconds` are those of this process.

    `updates` is below `steps` where steps gave no signal to learn from. `after` is None where a
    signal ended the run, by `request`, before its last step.
    """

    before: MeanReward
    after: MeanReward | None
    steps: int
    updates: int
    seconds: float
    directory: RunDirectory
    alarms: tuple[str, ...]
    kept: int | None
    """The version that was brought back when an alarm stopped the run."""
    request: StopRequest


def run_experiment(
    config: TrainConfig,
    directory: RunDirectory,
    console: Console,
    algorithm: Algorithm | None = None,
    prepare: Callable[[Experiment], None] = lambda experiment: None,
    *,
    begun: bool = False,
    forced: bool = False,
) -> Outcome:
    """Prepare, measure, train, measure again; what it comes to stays in `directory`.

    A run that was `begun` there before goes on from its last checkpoint, if it has one; where that
    is `forced`, with tasks that may be others.
    """
    algorithm = algorithm or find_algorithm(config.algorithm)
    environment, reward = find_task(config.task)
    if not begun:
        claim(directory)
    with ExitStack() as opened:
        opened.enter_context(directory.lock())
        directory.remove_partial_files()
        experiment = assemble(config, environment, reward, algorithm, directory)
        first = experiment.trainer.version
        prepare(experiment)
        checkpoints = checkpoints_of(directory, config)
        resume = _newest(checkpoints, console)
        if resume and forced:
            resume.facts["tasks"].pop("seen", None)
        if resume:
            _put_back(experiment, resume)
        # Not before: options that the checkpoint does not take must not stay behind.
        directory.write_config(to_toml(config))
        scorer = open_scorer(opened, experiment.reward, console)
        tracker = tracker_of(
            config,
            directory,
            console,
            resume_step=resume.step if resume else 0,
            sample_groups=config.run.sample_groups,
        )
        best = BestAdapter(experiment.adapters, directory.best)
        observer = Observer(
            directory,
            opened.enter_context(tracker),
            console,
            best,
            _evaluator(experiment, scorer, config, opened, console),
            every=config.evaluation.every,
            stop_on_alarm=config.run.stop_on_collapse,
        )
        started = time.perf_counter()
        with stopping(console.note) as request:
            before = _begin(observer, directory, resume, console)
            _train(
                experiment,
                config,
                scorer=scorer,
                on_step=request.heeded(observer.see),
                checkpoints=checkpoints,
                resume=resume,
            )
            console.close()
            updates = experiment.trainer.version - first
            if observer.stopped:
                _bring_back(best, experiment)
            elif updates == 0:
                # Each update publishes; without any, the file still has to be there for `eval`.
                experiment.adapters.publish()
            ended = observer.stopped or observer.steps >= config.run.steps
            after = observer.finish(experiment.policy.version) if ended else None
        return Outcome(
            before=before,
            after=after,
            steps=observer.steps,
            updates=updates,
            seconds=time.perf_counter() - started,
            directory=directory,
            alarms=tuple(map(str, observer.alarms)),
            kept=best.version if observer.stopped else None,
            request=request,
        )


def checkpoints_of(directory: RunDirectory, config: TrainConfig) -> Checkpoints:
    """What the run can be gone on with from."""
    run = config.run
    return Checkpoints(directory.checkpoints, keep=run.keep_checkpoints, every=run.checkpoint_every)


def _newest(checkpoints: Checkpoints, console: Console) -> Checkpoint | None:
    found = checkpoints.newest()
    for damage in checkpoints.damaged:
        console.note(terminal_safe(f"passed over: {damage}"))
    if found:
        console.note(f"going on after step {found.step}")
        for package, now in versions().items():
            if (then := found.facts["versions"][package]) != now:
                console.note(
                    f"{package} was {then} and is {now}: numbers may differ in their last digits"
                )
    return found


def _put_back(experiment: Experiment, checkpoint: Checkpoint) -> None:
    """Adapters as they were, for what is measured before the loop puts back everything."""
    experiment.trainer.restore(checkpoint.arrays, checkpoint.facts["trainer"])
    experiment.policy.reload(experiment.trainer.published)


def _begin(
    observer: Observer, directory: RunDirectory, resume: Checkpoint | None, console: Console
) -> MeanReward:
    """The score before the first step: measured, or as the run's first row has it."""
    if resume is None:
        return observer.evaluate("before")
    rows = read_metrics(directory.metrics)
    if not rows or "eval/reward" not in rows[0]:
        raise DataError(
            f"{directory.metrics} has no row of the first step, with what the run began at. Put "
            f"the file back as it was, or begin a new run from the adapters: {directory.latest}"
        )
    if lost := set(range(resume.step)) - {int(row["step"]) for row in rows}:
        # A full disk, or a machine that lost power.
        console.note(f"{directory.metrics} has no rows of {len(lost)} steps, from {min(lost)} on")
    observer.go_on(rows, resume.step)
    return observer.score_in(rows[0])


def _train(
    experiment: Experiment,
    config: TrainConfig,
    *,
    scorer: Scorer,
    on_step: Callable[[StepReport], Progress | None],
    checkpoints: Checkpoints,
    resume: Checkpoint | None,
) -> None:
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
        on_step=on_step,
        checkpoints=checkpoints,
        resume=resume,
    )


def _evaluator(
    experiment: Experiment,
    scorer: Scorer,
    config: TrainConfig,
    opened: ExitStack,
    console: Console,
) -> Evaluator:
    environment, options = experiment.environment, config.evaluation
    return Evaluator(
        policy=experiment.policy,
        heldout=HeldOut(
            name=environment.name,
            tasks=environment.heldout(options.count),
            scorer=scorer,
            max_tokens=experiment.policy.sampling.max_tokens,
        ),
        others=[held_out(opened, name, config, console) for name in options.envs or ()],
        samples=options.samples,
        temperature=options.temperature,
        good=options.good,
    )


def open_scorer(
    opened: ExitStack, rewards: Rewards, console: Console, *, kind: type[Scorer] = Scorer
) -> Scorer:
    """A scorer whose incidents are told on the console, closed with `opened`."""

    def on_incident(incident: Incident) -> None:
        console.note(terminal_safe(str(incident)))

    return opened.enter_context(closing(kind(rewards, on_incident=on_incident)))


def held_out(opened: ExitStack, name: str, config: TrainConfig, console: Console) -> HeldOut:
    """The held-out tasks of another environment, with the reward of its own."""
    environment, rewards = find_task(elsewhere(config.task, name))
    return HeldOut(
        name=environment.name,
        tasks=environment.heldout(config.evaluation.count),
        scorer=open_scorer(opened, rewards, console),
        max_tokens=sampling_of(config, environment).max_tokens,
    )


def _bring_back(best: BestAdapter, experiment: Experiment) -> None:
    """Make the best adapter the final one: in the trainer, in the published file, in the policy."""
    experiment.adapters.swap(best.path)
    experiment.adapters.publish()
    experiment.policy.reload(experiment.trainer.published)
