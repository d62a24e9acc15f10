"""Measure which learning rates train a real model: every rate on every task, with LoRA.

    python benchmarks/rates.py --model build/smollm2-135m --env words.py --few-shot 3 \\
        --rates 5e-5,1e-4,3e-4,1e-3 --output benchmarks/results/rates.json

GRPO trains the model for a few steps at each rate. The script reports the mean reward of the first
and of the last rollouts, sampled at temperature 1, the entropy at the end, and the greedy reward on
held-out tasks before and after. A rate is too low if the reward stands still, and too high if the
reward falls while entropy rises or vanishes. `--output` adds the records to the file's own.
"""

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from setting import setting

from textpolicy import fast_cpu
from textpolicy.config import TrainConfig, changed
from textpolicy.experiment.events import Reporter, RunEvent
from textpolicy.experiment.reinforcement import train_policy
from textpolicy.runs import RunDirectory

_WINDOW = 5  # steps whose rewards are averaged at the beginning and at the end


def measure_run(config: TrainConfig) -> dict[str, Any]:
    """Train once, and return a record with the rewards of the steps and the held-out rewards."""
    rows: list[dict[str, float]] = []

    def see(event: RunEvent) -> None:
        print(event, file=sys.stderr)
        if event.kind == "step":
            rows.append(dict(event.metrics))

    with tempfile.TemporaryDirectory() as folder:
        result = train_policy(config, RunDirectory(Path(folder)), Reporter(see))
    assert result.before and result.after
    rewards = [row["reward"] for row in rows]
    return {
        "model": Path(config.model.name).name,
        "env": Path(str(config.task.env)).stem,
        "few_shot": config.task.few_shot,
        "lr": config.trainer.lr,
        "rank": config.adapter.rank,
        "scale": config.adapter.scale,
        "groups": config.rollout.groups_per_step,
        "group_size": config.rollout.group_size,
        "held_out": result.before.count,
        "seed": config.run.seed,
        "steps": result.steps,
        "before": round(result.before.value, 4),
        "after": round(result.after.value, 4),
        "standard_error": round(result.after.standard_error or 0.0, 4),
        "first_rewards": round(fmean(rewards[:_WINDOW]), 4),
        "last_rewards": round(fmean(rewards[-_WINDOW:]), 4),
        "last_entropy": round(fmean(row["entropy"] for row in rows[-_WINDOW:]), 4),
        "rewards": [round(reward, 3) for reward in rewards],
        "alarms": sorted({alarm.partition(":")[0] for alarm in result.alarms}),
        "seconds": round(result.seconds, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="default: tiny")
    parser.add_argument("--env", required=True, help="separated by commas")
    parser.add_argument("--few-shot", type=int, default=0)
    parser.add_argument("--rates", required=True, help="separated by commas")
    parser.add_argument("--ranks", default="16", help="separated by commas (default: 16)")
    parser.add_argument("--alpha", type=float, default=32.0, help="scale times rank (default: 32)")
    parser.add_argument("--steps", type=int, default=20, help="default: 20")
    parser.add_argument("--groups", type=int, default=8, help="tasks of a step (default: 8)")
    parser.add_argument("--group-size", type=int, default=8, help="default: 8")
    parser.add_argument("--count", type=int, default=96, help="held-out tasks (default: 96)")
    parser.add_argument("--seeds", default="0", help="separated by commas (default: 0)")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--output", type=Path, metavar="FILE", help="add the records to this file")
    options = parser.parse_args()
    if fast_cpu.enable().threads:
        fast_cpu.set_threads(options.threads)
    for env, rank, rate, seed in itertools.product(
        options.env.split(","),
        map(int, options.ranks.split(",")),
        map(float, options.rates.split(",")),
        map(int, options.seeds.split(",")),
    ):
        config = changed(
            TrainConfig(),
            {
                "task.env": env,
                "task.few_shot": options.few_shot,
                "model.name": options.model,
                "adapter.rank": rank,
                "adapter.scale": options.alpha / rank,
                "trainer.lr": rate,
                "rollout.groups_per_step": options.groups,
                "rollout.group_size": options.group_size,
                "evaluation.count": options.count,
                "run.steps": options.steps,
                "run.seed": seed,
            },
        )
        record = measure_run(config)
        print(_line(record), flush=True)
        if options.output:
            _add(options.output, record)
    return 0


def _line(record: dict[str, Any]) -> str:
    return (
        f"{record['env']:<12} rank {record['rank']:<3} lr {record['lr']:<7g} "
        f"seed {record['seed']}  "
        f"sampled {record['first_rewards']:.3f} -> {record['last_rewards']:.3f}  "
        f"greedy {record['before']:.3f} -> {record['after']:.3f}  "
        f"entropy {record['last_entropy']:.3f}  {record['seconds']:.0f} s"
    )


def _add(path: Path, record: dict[str, Any]) -> None:
    """Add a record to the file, with the machine that it was measured on."""
    known = json.loads(path.read_text()) if path.exists() else {"runs": []}
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"setting": setting(), "runs": [*known["runs"], record]}
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
