"""From the settings of a run to its parts, and from its parts to two numbers: before and after.

`train` and `demo` are this file with different settings. `assemble` is the place to look for how
a model, its adapters, a policy and a trainer fit together; `textpolicy.loop` turns them round.
"""

import json
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np

from textpolicy import algorithms
from textpolicy.adapters.config import AdapterConfig
from textpolicy.adapters.container import AdapterContainer
from textpolicy.adapters.quantization import quantize
from textpolicy.adapters.twin import twin
from textpolicy.algorithms import Algorithm
from textpolicy.cli.observer import Observer
from textpolicy.cli.options import DYNAMIC_ROUNDS, RunSettings
from textpolicy.environments import Dataset, Environment, from_dataset, load
from textpolicy.environments.single_turn import answer_of, prompt_text
from textpolicy.errors import ConfigError, RewardError
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.policy import ModelPolicy
from textpolicy.loop import train_rl
from textpolicy.rewards import (
    Incident,
    OnError,
    Rewards,
    Scorer,
    as_rewards,
    load_reward,
    sample_of,
    scorer_of,
)
from textpolicy.rollout.worker import collect
from textpolicy.tracking.best import BestAdapter
from textpolicy.tracking.console import Console, visible
from textpolicy.tracking.jsonl import MetricsFile
from textpolicy.tracking.sink import Sink
from textpolicy.tracking.wandb_run import WandbRun
from textpolicy.training.optimizer import build_optimizer
from textpolicy.training.trainer import Trainer
from textpolicy.types import Sampling, Task

ADAPTERS = "adapters.safetensors"
BEST = "best.safetensors"
METRICS = "metrics.jsonl"
REJECTED = "rejected"


@dataclass(frozen=True, kw_only=True)
class Score:
    """The mean reward of greedy completions over `count` tasks."""

    reward: float
    standard_error: float
    count: int

    def __str__(self) -> str:
        return f"{self.reward:.3f} ± {self.standard_error:.3f}"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that a run needs, ready to go round."""

    environment: Environment
    adapters: AdapterContainer
    reward: Rewards
    policy: ModelPolicy
    trainer: Trainer
    refill_rounds: int


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


def find_task(
    env: str | None,
    reward: str | None,
    *,
    data: str | None = None,
    prompt: str | None = None,
    timeout: float | None = None,
    on_error: OnError | None = None,
) -> tuple[Environment, Rewards]:
    """The environment, with its own reward or the one in `reward` ("FILE.py:FUNCTION").

    Without `env`, the rows of `data` are one. `timeout` and `on_error` go before what the file
    itself says of them.
    """
    given = load_reward(reward) if reward else None
    environment = load(env, data) if env else _environment_of(data, prompt, given)
    if env and prompt:
        raise ConfigError(f"environment {env} writes its prompts itself; --prompt goes with --data")
    rewards = as_rewards(given or environment.reward)
    if timeout is not None:
        rewards = replace(rewards, timeout=timeout)
    if on_error is not None:
        rewards = replace(rewards, on_error=on_error)
    if reward:
        # An answer scored now: what cannot score is found out before a model loads.
        (task,) = environment.heldout(1)
        gold = answer_of(environment.gold(task.example), -1) if environment.gold else ""
        with scorer_of(replace(rewards, on_error="fail")) as scorer:
            scorer.score([sample_of(prompt_text(task.prompt), gold, task.example)])
    return environment, rewards


def _environment_of(
    data: str | None, prompt: str | None, reward: Callable[..., Any] | Rewards | None
) -> Environment:
    if data is None:
        raise ConfigError(
            "there is nothing to train on: name an environment, --env sort (`textpolicy envs` "
            "lists them), or rows and a reward, --data rows.jsonl --reward my_reward.py"
        )
    if reward is None:
        raise ConfigError(
            f"the rows of {data} come without a reward: name the file of yours, --reward "
            "my_reward.py, or an environment that knows such rows, --env gsm8k"
        )
    return from_dataset(Dataset.load(data, prompt), reward)


def fresh_folder(name: str, parent: Path = Path("runs")) -> Path:
    """A folder for a run of this name that no earlier run has taken."""
    plain = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"
    numbered = (parent / (f"{plain}-{number}" if number > 1 else plain) for number in count(1))
    return next(folder for folder in numbered if not folder.exists())


def find_algorithm(settings: RunSettings) -> Algorithm:
    """The algorithm that the settings name, with the divergence that they ask for."""
    return algorithms.get(settings.algorithm, **({"beta": settings.beta} if settings.beta else {}))


def assemble(settings: RunSettings, output: Path, algorithm: Algorithm) -> Experiment:
    """Trainer and policy on twins of one model: they share its base and nothing else."""
    dynamic = DYNAMIC_ROUNDS if algorithm.dynamic_sampling else 1
    environment, reward = find_task(
        settings.env,
        settings.reward,
        data=settings.data,
        prompt=settings.prompt,
        timeout=settings.reward_timeout,
        on_error=settings.on_reward_error,
    )
    claim(output)
    sampling = Sampling(
        max_tokens=settings.max_tokens or environment.max_tokens, temperature=settings.temperature
    )
    model, tokenizer = load_model(settings.model)
    if settings.quantize:
        quantize(model, bits=settings.quantize)
    config = AdapterConfig(rank=settings.rank, scale=settings.scale)
    adapters = AdapterContainer.from_model(model, config, seed=settings.seed)
    adapters.publish_path = output / ADAPTERS
    return Experiment(
        environment=environment,
        adapters=adapters,
        reward=reward,
        policy=ModelPolicy(twin(model), tokenizer, sampling, seed=settings.seed),
        trainer=_trainer(model, settings, algorithm, output),
        refill_rounds=settings.refill_rounds or dynamic,
    )


def _trainer(
    model: nn.Module, settings: RunSettings, algorithm: Algorithm, output: Path
) -> Trainer:
    options = dict(algorithm.trainer)
    if settings.beta:
        options["reference"] = "base"
    if settings.mini_batches:
        options["mini_batches"] = settings.mini_batches
    updates = settings.steps * settings.epochs * options.get("mini_batches", 1)
    return Trainer(
        model,
        algorithm.compute_advantages,
        algorithm.policy_loss,
        build_optimizer(
            settings.lr,
            schedule=settings.schedule,
            warmup=settings.warmup,
            updates=updates,
            weight_decay=settings.weight_decay,
        ),
        micro_batch_size=settings.micro_batch_size,
        epochs=settings.epochs,
        checkpoint_gradients=settings.checkpoint_gradients,
        rejected=output / REJECTED,
        seed=settings.seed,
        **options,
    )


def run_experiment(
    settings: RunSettings,
    output: Path,
    console: Console,
    algorithm: Algorithm | None = None,
    prepare: Callable[[Experiment], None] = lambda experiment: None,
) -> Outcome:
    """Prepare, measure, train, measure again; the last adapters stay in `output`."""
    algorithm = algorithm or find_algorithm(settings)
    experiment = assemble(settings, output, algorithm)
    prepare(experiment)
    (output / "config.json").write_text(json.dumps(asdict(settings), indent=2) + "\n")
    # Steps of a run that failed before its first update are none of this run's.
    (output / METRICS).unlink(missing_ok=True)

    def on_incident(incident: Incident) -> None:
        console.note(visible(str(incident)))

    with closing(Scorer(experiment.reward, on_incident=on_incident)) as scorer:
        return _train_and_measure(experiment, scorer, settings, output, console)


def _train_and_measure(
    experiment: Experiment, scorer: Scorer, settings: RunSettings, output: Path, console: Console
) -> Outcome:
    policy = experiment.policy
    heldout = experiment.environment.heldout(settings.count)
    best = BestAdapter(experiment.adapters, output / BEST)
    started = time.perf_counter()
    before = measure(policy, heldout, scorer)
    console.note(f"before  {before}  greedy reward on {before.count} held-out tasks")
    with ExitStack() as opened:
        sinks = [opened.enter_context(closing(sink)) for sink in open_sinks(settings, output)]
        observer = Observer(sinks, console, best, stop_on_alarm=settings.stop_on_collapse)
        train_rl(
            tasks=experiment.environment.stream(settings.seed),
            reward=scorer,
            policy=policy,
            trainer=experiment.trainer,
            steps=settings.steps,
            groups_per_step=settings.groups_per_step,
            group_size=settings.group_size,
            refill_rounds=experiment.refill_rounds,
            seed=settings.seed,
            on_step=observer.see,
        )
    console.close()
    updates = experiment.trainer.version
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


def open_sinks(settings: RunSettings, output: Path) -> list[Sink]:
    """Where the run's metrics go: a file in `output`, and W&B if asked."""
    sinks: list[Sink] = [MetricsFile(output / METRICS)]
    if settings.wandb:
        sinks.append(WandbRun(settings.wandb, folder=output, config=asdict(settings)))
    return sinks


def measure(policy: ModelPolicy, tasks: Sequence[Task], scorer: Scorer) -> Score:
    """Score greedy completions of the policy's model, as it is now."""
    sampling = Sampling(max_tokens=policy.sampling.max_tokens, temperature=0)
    greedy = ModelPolicy(policy.model, policy.tokenizer, sampling)
    groups = collect(tasks, greedy, scorer, group_size=1, seed=0)
    rewards = [r.reward for group in groups for r in group.rollouts if r.reward is not None]
    if not rewards:
        raise RewardError(f"the reward declined to score each of {len(tasks)} held-out completions")
    return Score(
        reward=float(np.mean(rewards)),
        standard_error=float(np.std(rewards) / np.sqrt(len(rewards))),
        count=len(rewards),
    )


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
