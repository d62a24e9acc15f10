"""docs/metrics.md lists every metric that runs write, and no other metric."""

import json
import re
from itertools import islice
from pathlib import Path

import pytest

from tests.rollout.test_feed import Run
from textpolicy.adapters import AdapterConfig, AdapterContainer, shared_copy
from textpolicy.algorithms import get
from textpolicy.cli import main
from textpolicy.environments import load
from textpolicy.generation.mlx_generation import create_policy
from textpolicy.loop import train_rl
from textpolicy.rewards import Score
from textpolicy.training.optimizer import build_optimizer
from textpolicy.training.trainer import Trainer

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
SMALL = ["--groups-per-step", "2", "--group-size", "4", "--count", "4", "--steps", "2"]


def documented() -> set[str]:
    """Return the names in the first column of each table."""
    columns = re.findall(r"^\|([^|]+)\|", PAGE.read_text(), flags=re.MULTILINE)
    return {name for column in columns for name in re.findall(r"`([^`]+)`", column)}


def pattern(name: str) -> re.Pattern[str]:
    """Return the pattern of a documented name: a word in capitals stands for any name."""
    parts = re.split(r"([A-Z]+|\.\.\.)", name)
    open_ = {"...": ".+"}
    return re.compile(
        "".join(
            open_.get(part, r"[^/]+") if number % 2 else re.escape(part)
            for number, part in enumerate(parts)
        )
    )


def written(folder: Path) -> set[str]:
    """Return the names in the rows of a run."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {name for line in lines for name in json.loads(line)} - {"step"}


def measured(prompt, completion):
    return Score(sum(map(ord, completion)) % 10 / 10, {"length": float(len(completion))})


# All weights of tokens. Each weight reports a metric.
WEIGHTS = ("truncate_tokens", "mask_tokens", "off_policy_mask", "top_entropy_tokens")


@pytest.fixture(scope="module")
def of_algorithms(load_tiny, tmp_path_factory):
    """Return the metrics of one step with the algorithms and options that have own metrics."""
    names: set[str] = set()
    for number, (algorithm, own, options) in enumerate(
        [
            ("grpo", {"weights": WEIGHTS}, {"old_logprobs": "fresh"}),
            ("cispo", {}, {}),
            ("vespo", {}, {}),
            ("dpo", {}, {}),
        ]
    ):
        chosen = get(algorithm, **own)
        model, tokenizer = load_tiny()
        adapters = AdapterContainer.from_model(model, AdapterConfig(rank=2))
        adapters.publish_path = tmp_path_factory.mktemp(f"{number}") / "adapters.safetensors"
        trainer = Trainer(
            model,
            chosen.compute_advantages,
            chosen.policy_loss,
            build_optimizer(1e-3),
            **(dict(chosen.trainer) | options),
        )
        names |= train_rl(
            tasks=islice(load("add").stream(0), 2),
            reward=measured,
            policy=create_policy(shared_copy(model), tokenizer, {"max_tokens": 6}),
            trainer=trainer,
            steps=1,
            groups_per_step=2,
            # As dpo has it: one chosen, one rejected.
            group_size=2,
        ).keys()
    return names


MEASURED = """
from textpolicy.rewards import Rewards, Score

def measured(prompt, completion):
    return Score(sum(map(ord, completion)) % 10 / 10, {"length": float(len(completion))})

def brief(completion):
    return -len(completion)

both = Rewards([measured, brief])
"""
AGENT = Path(__file__).resolve().parents[2] / "examples" / "my_agent.py"


@pytest.fixture(scope="module")
def of_commands(tmp_path_factory):
    """Return the metrics of runs of `train`, with and without tools, of an agent, and of `sft`."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"prompt": f"{n}+1=", "completion": f"{n + 1}"} for n in range(20)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "measured.py").write_text(MEASURED)
    evaluated = ["--eval-samples", "2", "--eval-envs", "reverse", "--beta", "0.1"]
    own = ["--reward", f"{folder / 'measured.py'}:both", "--gold-column", "completion"]
    own += ["--data", str(folder / "rows.jsonl"), "--max-tokens", "4"]
    runs = {
        "single": ["train", *own, *SMALL, *evaluated],
        "agent": ["train", "--env", f"agent:{AGENT}", *SMALL],
        "tools": ["train", "--env", "calculator", *SMALL],
        "sft": ["sft", "--data", str(folder / "rows.jsonl"), "--iterations", "2"],
    }
    for run, argv in runs.items():
        assert main([*argv, "--output", str(folder / run)]) == 0
    return {run: written(folder / run) for run in runs}


@pytest.fixture(scope="module")
def of_workers(load_tiny, tmp_path_factory):
    """Return the metrics of a step with workers."""
    (report,) = Run(load_tiny, tmp_path_factory.mktemp("workers")).train(steps=1).reports
    return report.metrics.keys()


@pytest.mark.slow
def test_every_metric_is_documented(of_algorithms, of_workers, of_commands):
    patterns = list(map(pattern, documented()))
    names = of_algorithms.union(of_workers, *of_commands.values())
    assert len(names) > 80
    assert not {name for name in names if not any(p.fullmatch(name) for p in patterns)}


@pytest.mark.slow
def test_every_documented_metric_is_reported(of_algorithms, of_workers, of_commands):
    names = of_algorithms.union(of_workers, *of_commands.values())
    assert not {known for known in documented() if not any(map(pattern(known).fullmatch, names))}


def test_a_word_in_capitals_stands_for_any_name():
    assert pattern("rewards/NAME/mean").fullmatch("rewards/my-own/mean")
    assert not pattern("rewards/NAME/mean").fullmatch("rewards/a/b/mean")
    assert pattern("eval/pass@K").fullmatch("eval/pass@16")
    assert pattern("eval/ENV/...").fullmatch("eval/sort/pass@16")
    assert not pattern("eval/reward").fullmatch("eval/rewards")
