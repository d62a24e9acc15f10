"""Record the metrics that alarms read, in runs that collapse and in healthy runs.

    python benchmarks/collapse.py --output tests/golden/collapse

Each run starts from the embedded model. The healthy runs have the default settings of `textpolicy
train`. The other runs collapse on purpose: by a learning rate far too high, for LoRA and for full
fine-tuning, by rewards given to the wrong rollouts, and by a reward for length. The script prints
the alarms of each run, and writes one JSON file a run with the metrics of `tracking.alarms`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from learning import with_shuffled_rewards
from setting import setting

from textpolicy import fast_cpu
from textpolicy.adapters.config.adapter_config import AdapterConfig
from textpolicy.adapters.container import AdapterContainer
from textpolicy.algorithms import grpo
from textpolicy.config import TrainConfig
from textpolicy.environments import load
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.policy import ModelPolicy
from textpolicy.loop import StepReport, train_rl
from textpolicy.rewards import as_rewards
from textpolicy.tracking.alarms import ALARM_METRICS, Alarm, AlarmMonitor
from textpolicy.training.optimizer import build_optimizer
from textpolicy.training.trainer import Trainer
from textpolicy.types import Sampling

DEFAULT = TrainConfig()
LONG = 24


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The settings of one run. All other settings are the defaults of `textpolicy train`."""

    env: str
    healthy: bool = False
    steps: int = 60
    lr: float = DEFAULT.trainer.lr
    seed: int = 0
    adapters: bool = True
    shuffled: bool = False
    for_length: bool = False


SETTINGS = {
    "hot_lora_add": Setting(env="add", lr=1e-2),
    "hot_full_add": Setting(env="add", lr=1e-3, adapters=False),
    "long_add": Setting(env="add", for_length=True, steps=100),
    "healthy_add": Setting(env="add", healthy=True, steps=120),
    "shuffled_reverse": Setting(env="reverse", shuffled=True, steps=120),
    "healthy_sort": Setting(env="sort", healthy=True, steps=120),
    "hot_lora_sort": Setting(env="sort", lr=1e-2),
    "healthy_countdown": Setting(env="countdown", healthy=True, steps=120),
    "healthy_reverse": Setting(env="reverse", healthy=True, steps=120),
    "healthy_add_1": Setting(env="add", healthy=True, steps=120, seed=1),
    "hot_full_countdown": Setting(env="countdown", lr=1e-3, adapters=False),
}


def length(completion: str) -> float:
    """Return a reward that grows with the length of the completion."""
    return len(completion) / LONG


def record(run: Setting, show: Callable[[StepReport], None]) -> list[Mapping[str, float]]:
    """Train one run and return the metrics of every step."""
    environment = load(run.env)
    model, tokenizer = load_model("tiny")
    if run.adapters:
        AdapterContainer.from_model(model, AdapterConfig(), seed=run.seed)
    else:
        model.unfreeze()
    advantages = grpo.compute_advantages
    sampling = Sampling(max_tokens=LONG if run.for_length else environment.max_tokens)
    steps: list[Mapping[str, float]] = []

    def on_step(report: StepReport) -> None:
        steps.append(report.metrics)
        show(report)

    train_rl(
        tasks=environment.stream(run.seed),
        reward=as_rewards(length if run.for_length else environment.reward),
        policy=ModelPolicy(model, tokenizer, sampling, seed=run.seed),
        trainer=Trainer(
            model,
            with_shuffled_rewards(advantages, run.seed) if run.shuffled else advantages,
            grpo.policy_loss,
            build_optimizer(run.lr),
            skip_without_advantages=True,
            seed=run.seed,
        ),
        steps=run.steps,
        seed=run.seed,
        on_step=on_step,
    )
    return steps


def alarms_of(columns: Mapping[str, list[float]]) -> list[Alarm]:
    """Return the alarms of a run whose metrics are these columns, one value a step."""
    monitor = AlarmMonitor()
    rows = zip(*columns.values(), strict=True)
    return [
        alarm
        for step, row in enumerate(rows)
        for alarm in monitor.check(step, dict(zip(columns, row, strict=True)))
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", choices=SETTINGS, help="record only this run (default: all runs)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="the folder for the JSON files")
    options = parser.parse_args()
    if fast_cpu.enable().threads:
        fast_cpu.set_threads(1)
    wrong = 0
    for name in [options.run] if options.run else SETTINGS:
        run = SETTINGS[name]

        def show(report: StepReport, name: str = name) -> None:
            print(f"\r{name} {report.step + 1}/{report.steps}", end="", file=sys.stderr, flush=True)

        steps = record(run, show)
        columns = {column: [round(step[column], 4) for step in steps] for column in ALARM_METRICS}
        alarms = alarms_of(columns)
        wrong += run.healthy == bool(alarms)
        print(f"\r{name}: {', '.join(f'{a.name} at {a.step}' for a in alarms) or 'no alarm'}")
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)
            data: dict[str, Any] = {"run": asdict(run), "setting": setting(), "columns": columns}
            (options.output / f"{name}.json").write_text(json.dumps(data) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
