"""Measure whether reinforcement learning raises held-out accuracy, and whether noise does so too.

    python benchmarks/learning.py --env add --seeds 0,1,2 --control --json

For each seed an algorithm trains the embedded model with LoRA, as `textpolicy train` does. The
script reports the greedy accuracy on 512 held-out problems before and after. The control is the
same run with the rewards of each step shuffled across the whole batch, so that its advantages are
noise. Distillation learns from a model that GRPO trained; its control receives the teacher's
log-probabilities of the wrong tokens. The exit code is 1 if a trained run gains less than MARGIN,
or a control gains more.

The model cannot play `calculator` (tool use) and `hilo` (several turns). There the model first
imitates gold episodes for a few iterations, and "before" is measured after this imitation. The
greedy reward of these environments is the reward of whole episodes. `agent` is the program in
examples/my_agent.py, which plays the tasks of `calculator`; it imitates the same gold episodes.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial, wraps
from itertools import islice, product
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from setting import setting

from textpolicy import fast_cpu
from textpolicy.algorithms import Algorithm
from textpolicy.config import ALGORITHMS, DEMO, TrainConfig, changed
from textpolicy.environments import gold_answers, load
from textpolicy.experiment.assembly import Experiment, find_algorithm
from textpolicy.experiment.events import Reporter, RunEvent, RunResult
from textpolicy.experiment.reinforcement import train_policy
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.scripted import ScriptedPolicy
from textpolicy.rollout.worker import collect
from textpolicy.runs import RunDirectory
from textpolicy.training.sft import Demonstration, SFTParameters, train_sft
from textpolicy.types import AdvantageFn, Batch, LossFn

ENVS = ("add", "sort", "reverse", "countdown")
# Environments of several turns, and the iterations of imitation before the run.
AGENT = f"agent:{Path(__file__).resolve().parents[1] / 'examples' / 'my_agent.py'}"
WARM_UPS = {"calculator": 120, "hilo": 80, AGENT: 120}
WARM_UP_LR = 2e-3
EPISODES: dict[str, Any] = {"run.steps": 60, "trainer.lr": 3e-4, "evaluation.count": 256}
GOLD_EPISODES = 2000
# 512 problems give each accuracy a standard error of about 0.02.
MARGIN = 0.03


def with_shuffled_rewards(advantage_fn: AdvantageFn, seed: int) -> AdvantageFn:
    """Return an advantage function that first deals the rewards to the wrong rollouts."""
    key = mx.random.key(seed)

    @wraps(advantage_fn)
    def compute_advantages(rewards: mx.array, **asked: Any) -> mx.array:
        nonlocal key
        key, now = mx.random.split(key)
        order = mx.random.permutation(rewards.size, key=now)

        def dealt(values: mx.array) -> mx.array:
            return values.flatten()[order].reshape(values.shape)

        if "parts" in asked:
            asked["parts"] = {name: dealt(values) for name, values in asked["parts"].items()}
        return advantage_fn(dealt(rewards), **asked)

    return compute_advantages


def warm_up(experiment: Experiment, env: str, seed: int, iterations: int) -> None:
    """Train the adapters on gold episodes, until the model solves about half of the tasks."""
    environment, policy = experiment.environment, experiment.policy
    if env == AGENT:
        environment = load("calculator")
    tasks = list(islice(environment.stream(seed + 1000), GOLD_EPISODES))
    scripts = [gold_answers(environment, task) for task in tasks]
    script = ScriptedPolicy(policy.tokenizer, scripts)
    groups = collect(tasks, script, environment.reward, group_size=1, seed=0)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    demonstrations = [Demonstration(tokens=r.tokens, mask=r.mask) for r in rollouts]
    train_sft(
        experiment.trainer.model,
        demonstrations,
        [],
        optim.Adam(learning_rate=WARM_UP_LR, bias_correction=True),
        parameters=SFTParameters(batch_size=32, iterations=iterations, seed=seed),
    )
    experiment.adapters.publish()
    policy.reload(experiment.trainer.published)


def algorithm_of(config: TrainConfig, *, control: bool) -> Algorithm:
    """Return the algorithm of the config with its teacher, or the control of this algorithm."""
    algorithm = find_algorithm(config.algorithm)
    if config.algorithm.name == "distillation":
        algorithm = replace(algorithm, trainer={"reference": teacher(config)})
        if control:
            wrong = with_shuffled_teacher(algorithm.policy_loss, config.run.seed)
            algorithm = replace(algorithm, policy_loss=wrong)
    elif control:
        wrong = with_shuffled_rewards(algorithm.compute_advantages, config.run.seed)
        algorithm = replace(algorithm, compute_advantages=wrong)
    return algorithm


def teacher(config: TrainConfig) -> nn.Module:
    """Return the embedded model after a run of GRPO."""
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory(Path(folder))
        train_policy(changed(config, {"algorithm.name": "grpo"}), directory, Reporter(show))
        model, _ = load_model(config.model.name, directory.latest)
    return model


def show(event: RunEvent) -> None:
    """Print an event to stderr, so that stdout has only records."""
    print(event, file=sys.stderr)


def with_shuffled_teacher(policy_loss: LossFn, seed: int) -> LossFn:
    """Return the loss with the teacher's log-probabilities dealt to the wrong tokens."""
    random = np.random.default_rng(seed)

    def loss(logp: mx.array, batch: Batch) -> tuple[mx.array, dict[str, mx.array]]:
        assert batch.logp_ref is not None
        mask = np.array(batch.mask)
        differences = np.array(batch.logp_ref - batch.logp_old)
        differences[mask] = random.permutation(differences[mask])
        return policy_loss(logp, replace(batch, logp_ref=batch.logp_old + mx.array(differences)))

    return loss


def measure_run(config: TrainConfig, *, control: bool, imitation: int | None) -> dict[str, Any]:
    """Train the embedded model once, and return a record with its gain and its time.

    `imitation` replaces the number of iterations in WARM_UPS.
    """
    env = str(config.task.env)
    prepare = None
    if env in WARM_UPS:
        iterations = imitation or WARM_UPS[env]
        prepare = partial(warm_up, env=env, seed=config.run.seed, iterations=iterations)
    algorithm = algorithm_of(config, control=control)
    with tempfile.TemporaryDirectory() as folder:
        result: RunResult = train_policy(
            config,
            RunDirectory(Path(folder)),
            Reporter(show),
            algorithm=algorithm,
            prepare=prepare,
        )
    assert result.before and result.after
    gain = result.after.value - result.before.value
    return {
        "env": "agent" if env == AGENT else env,
        "algorithm": config.algorithm.name,
        "seed": config.run.seed,
        "control": control,
        "before": round(result.before.value, 4),
        "after": round(result.after.value, 4),
        "gain": round(gain, 4),
        "as_expected": gain < MARGIN if control else gain > MARGIN,
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
    }


def runs(options: argparse.Namespace) -> Iterator[tuple[TrainConfig, bool]]:
    """Yield the config of every requested run, and whether the run is a control."""
    several = {"all": ENVS, "episodes": ("calculator", "hilo"), "agent": (AGENT,)}
    envs = several.get(options.env, (options.env,))
    asked = {"run.steps": options.steps, "trainer.lr": options.lr, "adapter.rank": options.rank}
    given = {key: value for key, value in asked.items() if value is not None}
    algorithms = ALGORITHMS if options.algorithm == "all" else (options.algorithm,)
    for env, algorithm in product(envs, algorithms):
        for seed in map(int, options.seeds.split(",")):
            what = {"task.env": env, "run.seed": seed, "algorithm.name": algorithm}
            # An episode has several times the tokens of one answer.
            how = EPISODES if env in WARM_UPS else {}
            run = changed(DEMO, what | how | given)
            if algorithm == "dpo":
                pairs = run.rollout.groups_per_step * run.rollout.group_size // 2
                run = changed(run, {"rollout.group_size": 2, "rollout.groups_per_step": pairs})
            yield run, False
            if options.control:
                yield run, True


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = (*ENVS, "all", "calculator", "hilo", "episodes", "agent")
    text = "default: all tasks with one answer"
    parser.add_argument("--env", choices=names, default="all", help=text)
    parser.add_argument(
        "--algorithm",
        choices=(*ALGORITHMS, "all"),
        default=DEMO.algorithm.name,
        help="default: grpo",
    )
    parser.add_argument("--seeds", default="0", help="separated by commas (default: 0)")
    parser.add_argument("--control", action="store_true", help="train with shuffled rewards too")
    parser.add_argument("--steps", type=int, help=f"default: {DEMO.run.steps}, as in the demo")
    parser.add_argument("--lr", type=float, help=f"default: {DEMO.trainer.lr}, as in the demo")
    parser.add_argument("--rank", type=int, help="default: 16, as in the demo")
    parser.add_argument(
        "--imitation", type=int, help="iterations of imitation before a run of episodes"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object for each run, and a summary"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the records to this file too"
    )
    options = parser.parse_args()
    if fast_cpu.enable().threads:
        fast_cpu.set_threads(1)
    records = []
    for config, control in runs(options):
        record = measure_run(config, control=control, imitation=options.imitation)
        records.append(record)
        print(json.dumps(record) if options.json else _line(record), flush=True)
    summary = {"setting": setting(), "all_as_expected": all(r["as_expected"] for r in records)}
    if options.json:
        print(json.dumps(summary))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(summary | {"runs": records}, indent=2) + "\n")
    return 0 if summary["all_as_expected"] else 1


def _line(record: dict[str, Any]) -> str:
    kind = "shuffled" if record["control"] else "trained"
    verdict = "" if record["as_expected"] else "  <- not as expected"
    return (
        f"{record['env']:<10} {record['algorithm']:<22} seed {record['seed']}  {kind:<9} "
        f"{record['before']:.3f} -> {record['after']:.3f}  "
        f"({record['gain']:+.3f}, {record['seconds']:.0f} s){verdict}"
    )


if __name__ == "__main__":
    sys.exit(main())
