"""A run from its config to two numbers, before and after. `train` and `demo` are this file with
different configs; what it is made of is in `assembly`.
"""

import re
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from textpolicy.algorithms import Algorithm
from textpolicy.cli.assembly import Experiment, assemble, find_algorithm
from textpolicy.cli.observer import Observer
from textpolicy.cli.tasks import find_task
from textpolicy.config import SFTConfig, TrainConfig, settings_of, to_toml
from textpolicy.errors import ConfigError
from textpolicy.evaluation import Score, measure
from textpolicy.loop import train_rl
from textpolicy.rewards import Incident, Scorer
from textpolicy.runs import RunDirectory
from textpolicy.tracking.best import BestAdapter
from textpolicy.tracking.console import Console, visible
from textpolicy.tracking.open import Services, open_tracker
from textpolicy.tracking.tracker import Tracker

ADAPTERS = "adapters.safetensors"
BEST = "best.safetensors"
CONFIG = "config.toml"


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

    def on_incident(incident: Incident) -> None:
        console.note(visible(str(incident)))

    with closing(Scorer(experiment.reward, on_incident=on_incident)) as scorer:
        return _train_and_measure(experiment, scorer, config, output, console)


def _train_and_measure(
    experiment: Experiment, scorer: Scorer, config: TrainConfig, output: Path, console: Console
) -> Outcome:
    policy = experiment.policy
    heldout = experiment.environment.heldout(config.evaluation.count)
    best = BestAdapter(experiment.adapters, output / BEST)
    first = experiment.trainer.version
    started = time.perf_counter()
    before = measure(policy, heldout, scorer)
    console.note(f"before  {before}  greedy reward on {before.count} held-out tasks")
    with tracker_of(config, output, console) as tracker:
        observer = Observer(tracker, console, best, stop_on_alarm=config.run.stop_on_collapse)
        train_rl(
            tasks=experiment.environment.stream(config.run.seed),
            reward=scorer,
            policy=policy,
            trainer=experiment.trainer,
            steps=config.run.steps,
            groups_per_step=config.rollout.groups_per_step,
            group_size=config.rollout.group_size,
            steps_per_generation=config.rollout.steps_per_generation,
            refill_rounds=experiment.refill_rounds,
            seed=config.run.seed,
            on_step=observer.see,
        )
    console.close()
    updates = experiment.trainer.version - first
    if observer.stopped:
        _bring_back(best, experiment)
    elif updates == 0:
        # Each update publishes; without any, the file still has to be there for `eval`.
        experiment.adapters.publish()
    after = measure(policy, heldout, scorer)
    return Outcome(
        before=before,
        after=after,
        steps=observer.steps,
        updates=updates,
        seconds=time.perf_counter() - started,
        adapters=output / ADAPTERS,
        alarms=tuple(map(str, observer.alarms)),
        kept=best.version if observer.stopped else None,
    )


def _bring_back(best: BestAdapter, experiment: Experiment) -> None:
    """Make the best adapter the final one: in the trainer, in the published file, in the policy."""
    experiment.adapters.swap(best.path)
    experiment.adapters.publish()
    experiment.policy.reload(experiment.trainer.published)


def tracker_of(
    config: TrainConfig | SFTConfig,
    output: Path,
    console: Console,
    *,
    resume_step: int = 0,
    samples: bool = True,
) -> Tracker:
    """Where a run's numbers go: its files, and the services that were asked for."""
    return open_tracker(
        RunDirectory(output),
        Services(**asdict(config.tracking)),
        plain(config),
        notice=lambda text: console.note(visible(text)),
        resume_step=resume_step,
        samples=samples,
    )


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
