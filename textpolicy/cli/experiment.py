"""A run from its config to two numbers, before and after. `train` and `demo` are this file with
different configs; what it is made of is in `assembly`.
"""

import re
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from textpolicy.algorithms import Algorithm
from textpolicy.cli.assembly import Experiment, assemble, find_algorithm, sampling_of
from textpolicy.cli.observer import Observer
from textpolicy.cli.tasks import find_task
from textpolicy.config import SFTConfig, TrainConfig, settings_of, to_toml
from textpolicy.errors import ConfigError
from textpolicy.evaluation import Evaluator, HeldOut, Score
from textpolicy.loop import train_rl
from textpolicy.rewards import Incident, Rewards, Scorer
from textpolicy.tracking.best import BestAdapter
from textpolicy.tracking.console import Console, visible
from textpolicy.tracking.jsonl import MetricsFile
from textpolicy.tracking.sink import Sink
from textpolicy.tracking.tensorboard import TensorBoardRun
from textpolicy.tracking.wandb_run import WandbRun

ADAPTERS = "adapters.safetensors"
BEST = "best.safetensors"
CONFIG = "config.toml"
METRICS = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run achieved. `seconds` are those of training and both measurements.

    `updates` is below `steps` where steps gave no signal to learn from.
    """

    before: Score
    after: Score
    steps: int
    updates: int
    seconds: float
    adapters: Path
    alarms: tuple[str, ...]
    kept: int | None = None
    """The version that was brought back when an alarm stopped the run."""


def fresh_folder(name: str, parent: Path = Path("runs")) -> Path:
    """A folder for a run of this name that no earlier run has taken."""
    plain = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"
    numbered = (parent / (f"{plain}-{number}" if number > 1 else plain) for number in count(1))
    return next(folder for folder in numbered if not folder.exists())


def run_experiment(
    config: TrainConfig,
    output: Path,
    console: Console,
    algorithm: Algorithm | None = None,
    prepare: Callable[[Experiment], None] = lambda experiment: None,
) -> Outcome:
    """Prepare, measure, train, measure again; the last adapters stay in `output`."""
    algorithm = algorithm or find_algorithm(config.algorithm)
    environment, reward = find_task(config.task)
    claim(output)
    experiment = assemble(config, environment, reward, algorithm, output / ADAPTERS)
    prepare(experiment)
    (output / CONFIG).write_text(to_toml(config), "utf-8")
    # Steps of a run that failed before its first update are none of this run's.
    (output / METRICS).unlink(missing_ok=True)

    with ExitStack() as opened:
        sinks = [opened.enter_context(closing(sink)) for sink in open_sinks(config, output)]
        scorer = open_scorer(opened, experiment.reward, console)
        evaluator = Evaluator(
            policy=experiment.policy,
            heldout=HeldOut(
                name=environment.name,
                tasks=environment.heldout(config.evaluation.count),
                scorer=scorer,
                max_tokens=experiment.policy.sampling.max_tokens,
            ),
            others=[
                held_out(opened, name, config, console) for name in config.evaluation.envs or ()
            ],
            samples=config.evaluation.samples,
            temperature=config.evaluation.temperature,
            good=config.evaluation.good,
        )
        best = BestAdapter(experiment.adapters, output / BEST)
        observer = Observer(
            sinks,
            console,
            best,
            evaluator,
            every=config.evaluation.every,
            stop_on_alarm=config.run.stop_on_collapse,
        )
        return _train_and_measure(experiment, scorer, config, observer, best)


def _train_and_measure(
    experiment: Experiment,
    scorer: Scorer,
    config: TrainConfig,
    observer: Observer,
    best: BestAdapter,
) -> Outcome:
    first = experiment.trainer.version
    started = time.perf_counter()
    before = observer.evaluate("before")
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
        on_step=observer.see,
    )
    updates = experiment.trainer.version - first
    if observer.stopped:
        _bring_back(best, experiment)
    elif updates == 0:
        # Each update publishes; without any, the file still has to be there for `eval`.
        experiment.adapters.publish()
    after = observer.finish(experiment.policy.version)
    return Outcome(
        before=before,
        after=after,
        steps=observer.steps,
        updates=updates,
        seconds=time.perf_counter() - started,
        adapters=experiment.trainer.published,
        alarms=tuple(map(str, observer.alarms)),
        kept=best.version if observer.stopped else None,
    )


def open_scorer(opened: ExitStack, rewards: Rewards, console: Console) -> Scorer:
    """A scorer whose incidents are told on the console, closed with `opened`."""

    def on_incident(incident: Incident) -> None:
        console.note(visible(str(incident)))

    return opened.enter_context(closing(Scorer(rewards, on_incident=on_incident)))


def held_out(opened: ExitStack, name: str, config: TrainConfig, console: Console) -> HeldOut:
    """The held-out tasks of another environment, with the reward of its own."""
    environment, rewards = find_task(replace(config.task, env=name, data=None, reward=None))
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


def open_sinks(config: TrainConfig | SFTConfig, output: Path) -> list[Sink]:
    """Where the run's metrics go: a file in `output`, and services that were asked for."""
    sinks: list[Sink] = [MetricsFile(output / METRICS)]
    if project := config.tracking.wandb:
        sinks.append(WandbRun(project, folder=output, config=plain(config)))
    if config.tracking.tensorboard:
        sinks.append(TensorBoardRun(output / "tensorboard"))
    return sinks


def plain(config: TrainConfig | SFTConfig) -> dict[str, Any]:
    """Every setting by its key, in values that JSON can hold."""
    values = {setting.key: setting.default for setting in settings_of(config)}
    return {k: str(value) if isinstance(value, Path) else value for k, value in values.items()}


def claim(output: Path) -> None:
    """Make the folder and see that it can be written to, before a model is loaded for it."""
    if (output / ADAPTERS).exists():
        raise ConfigError(f"{output} holds the adapters of an earlier run; choose another folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ConfigError(
            f"cannot write to the output folder {output}: {error.strerror}; expected a folder "
            "that is yours, or a path where one can be made"
        ) from error
