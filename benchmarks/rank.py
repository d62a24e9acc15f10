"""Compare full fine-tuning with LoRA of rank 16 and of rank 1 in reinforcement learning.

    python benchmarks/rank.py --output benchmarks/results/rank.json --plot docs/images/rank.svg

GRPO trains the embedded model on each of four tasks in three ways: all weights (full fine-tuning),
LoRA of rank 16, and LoRA of rank 1, which trains a hundredth of the weights. Each way has the best
of three learning rates on `add`. The script reports the greedy reward on 512 held-out tasks before
and after training, and the mean reward of the rollouts of each step; the plot shows the latter.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten
from setting import setting

from textpolicy import fast_cpu
from textpolicy.adapters.config.adapter_config import AdapterConfig
from textpolicy.adapters.container import AdapterContainer
from textpolicy.algorithms import grpo
from textpolicy.environments import load
from textpolicy.evaluation import evaluate_greedy
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.policy import ModelPolicy
from textpolicy.loop import StepReport, train_rl
from textpolicy.rewards import as_rewards, scorer_of
from textpolicy.training.optimizer import build_optimizer
from textpolicy.training.trainer import Trainer
from textpolicy.types import Sampling

ENVS = ("add", "sort", "reverse", "countdown")


@dataclass(frozen=True)
class Variant:
    """Which weights are trained, and with which learning rate."""

    name: str
    lr: float
    prepare: Callable[[nn.Module, int], object]


def _all_weights(model: nn.Module, seed: int) -> object:
    model.unfreeze()
    return model


def _lora(rank: int, scale: float) -> Callable[[nn.Module, int], object]:
    config = AdapterConfig(rank=rank, scale=scale)
    return lambda model, seed: AdapterContainer.from_model(model, config, seed=seed)


VARIANTS = (
    Variant("full", 3e-5, _all_weights),
    Variant("rank 16", 5e-4, _lora(16, 2.0)),
    Variant("rank 1", 5e-4, _lora(1, 8.0)),
)


def measure_run(env: str, variant: Variant, steps: int, seed: int) -> dict[str, Any]:
    """Train once, and return a record with the rewards before, after and during training."""
    environment = load(env)
    model, tokenizer = load_model("tiny")
    variant.prepare(model, seed)
    policy = ModelPolicy(model, tokenizer, Sampling(max_tokens=environment.max_tokens), seed=seed)
    trainer = Trainer(
        model,
        grpo.compute_advantages,
        grpo.policy_loss,
        build_optimizer(variant.lr),
        skip_without_advantages=True,
        seed=seed,
    )
    rewards: list[float] = []

    def on_step(report: StepReport) -> None:
        rewards.append(report.metrics["reward"])
        print(f"\r{env} {variant.name} {report.step + 1}/{steps}", end="", file=sys.stderr)

    with scorer_of(as_rewards(environment.reward)) as scorer:
        heldout = environment.heldout(512)
        before = evaluate_greedy(policy, heldout, scorer)
        train_rl(
            tasks=environment.stream(seed),
            reward=scorer,
            policy=policy,
            trainer=trainer,
            steps=steps,
            seed=seed,
            on_step=on_step,
        )
        after = evaluate_greedy(policy, heldout, scorer)
    print(file=sys.stderr)
    moved: Any = tree_flatten(model.trainable_parameters())
    return {
        "env": env,
        "variant": variant.name,
        "lr": variant.lr,
        "seed": seed,
        "trainable": sum(array.size for _, array in moved),
        "before": round(before.reward, 4),
        "after": round(after.reward, 4),
        "rewards": [round(reward, 4) for reward in rewards],
    }


def plot(records: Sequence[dict[str, Any]]) -> str:
    """Return an SVG of four charts of reward by step, which loads nothing else."""
    panels = "".join(
        f'<g transform="translate({60 + 330 * (i % 2)} {40 + 230 * (i // 2)})">'
        f"{''.join(_panel(env, [r for r in records if r['env'] == env]))}</g>"
        for i, env in enumerate(ENVS)
    )
    legend = "".join(
        f'<g transform="translate({60 + 130 * i} 490)"><path d="M0 0h24" class="{_slug(v.name)}"/>'
        f'<text x="30" y="4">{v.name}</text></g>'
        for i, v in enumerate(VARIANTS)
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 505" role="img" '
        'aria-label="Reward by step of full fine-tuning and LoRA on four tasks">\n'
        f"<style>{_STYLE}</style>\n{panels}\n{legend}\n</svg>\n"
    )


_STYLE = (
    "text{font:12px sans-serif;fill:#57606a}path{fill:none;stroke-width:2}"
    ".frame,.grid{stroke:#8b949e;stroke-width:1}.grid{opacity:.35}"
    ".full{stroke:#0b7285}.rank-16{stroke:#e8590c}.rank-1{stroke:#862e9c}"
    "@media(prefers-color-scheme:dark){text{fill:#c9d1d9}.full{stroke:#3bc9db}"
    ".rank-16{stroke:#ffa94d}.rank-1{stroke:#e599f7}}"
)
_WIDTH, _HEIGHT = 280, 170


def _panel(env: str, records: Sequence[dict[str, Any]]) -> Iterator[str]:
    curves = {record["variant"]: _smooth(record["rewards"]) for record in records}
    low = min(min(curve) for curve in curves.values())
    low, high = int(low * 10) / 10, min(1.0, int(10 * max(map(max, curves.values())) + 1) / 10)
    yield f'<text x="{_WIDTH / 2}" y="-10" text-anchor="middle">{env}</text>'
    for value in (low, (low + high) / 2, high):
        y = _HEIGHT * (high - value) / (high - low)
        yield f'<path d="M0 {y:.1f}h{_WIDTH}" class="grid"/>'
        yield f'<text x="-8" y="{y + 4:.1f}" text-anchor="end">{value:.2f}</text>'
    steps = max(len(curve) for curve in curves.values())
    yield f'<path d="M0 0v{_HEIGHT}h{_WIDTH}" class="frame"/>'
    yield f'<text x="{_WIDTH}" y="{_HEIGHT + 16}" text-anchor="end">{steps} steps</text>'
    for name, curve in curves.items():
        points = " ".join(
            f"{_WIDTH * step / (steps - 1):.1f},{_HEIGHT * (high - value) / (high - low):.1f}"
            for step, value in enumerate(curve)
        )
        yield f'<path d="M{points}" class="{_slug(name)}"/>'


def _smooth(values: Sequence[float], window: int = 15) -> list[float]:
    """Return, for each step, the mean over the last `window` steps."""
    return [
        sum(values[max(0, at - window + 1) : at + 1]) / min(window, at + 1)
        for at in range(len(values))
    ]


def _slug(name: str) -> str:
    return name.replace(" ", "-")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env", choices=(*ENVS, "all"), default="all", help="default: all")
    parser.add_argument("--variant", choices=[v.name for v in VARIANTS], help="default: all")
    parser.add_argument("--lr", type=float, help="another learning rate for the variant")
    parser.add_argument("--steps", type=int, default=250, help="default: 250")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each run")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the records to a file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the plot to this file")
    options = parser.parse_args()
    if fast_cpu.enable().threads:
        fast_cpu.set_threads(1)
    records = []
    for env in ENVS if options.env == "all" else (options.env,):
        for variant in VARIANTS:
            if options.variant not in (None, variant.name):
                continue
            used = Variant(variant.name, options.lr or variant.lr, variant.prepare)
            record = measure_run(env, used, options.steps, options.seed)
            records.append(record)
            shown = {name: value for name, value in record.items() if name != "rewards"}
            print(json.dumps(shown) if options.json else _line(record), flush=True)
    if options.output:
        options.output.write_text(json.dumps({"setting": setting(), "runs": records}) + "\n")
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        options.plot.write_text(plot(records))
    return 0


def _line(record: dict[str, Any]) -> str:
    return (
        f"{record['env']:<10} {record['variant']:<8} lr {record['lr']:g}  "
        f"{record['trainable']:>7,} weights  {record['before']:.3f} -> {record['after']:.3f}"
    )


if __name__ == "__main__":
    sys.exit(main())
