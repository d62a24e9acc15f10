"""A run of TRL with the prompts, rewards, first adapter and learning rates of a run of ours."""

import json
import os
import resource
import subprocess
import sys
import tempfile
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
from real.units import recorded_score, rounded

from textpolicy import fast_cpu
from textpolicy.config import TrainConfig
from textpolicy.environments import Environment
from textpolicy.environments.chat import prompt_text
from textpolicy.errors import ConfigError
from textpolicy.evaluation import evaluate_greedy
from textpolicy.experiment.assembly import (
    adapt,
    dtype_of,
    optimizer_of,
    sampling_of,
    template_arguments_of,
)
from textpolicy.experiment.tasks import find_task
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.model_files import find_model
from textpolicy.generation.policy import ModelPolicy
from textpolicy.rewards import scorer_of
from textpolicy.types import Task

SCRIPT = Path(__file__).parents[1] / "sides" / "learn_with_trl.py"
INSTALL = "pip install --only-binary :all: 'trl==1.16.*' torch peft"
# Rows that TRL differentiates at once; more of them take memory and save little time.
_ROWS_PER_PASS = 16


def versions_of(python: str) -> dict[str, str] | None:
    """Return the versions of TRL and of what it computes with, or None if it is not installed."""
    names = ("trl", "peft", "transformers", "torch")
    program = (
        "import json, sys; from importlib.metadata import version; "
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    try:
        done = subprocess.run([python, "-c", program, *names], capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return json.loads(done.stdout) if done.returncode == 0 else None


def train_with_trl(
    config: TrainConfig, python: str, before: dict[str, float] | None
) -> dict[str, Any]:
    """Train with TRL, and evaluate its adapter by TextPolicy. Return what is recorded.

    `before` is the held-out score of the base model, if it is known.
    """
    environment, _ = find_task(config.task, config.run.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task = task_of(config, environment, folder)
        (folder / "task.json").write_text(json.dumps(task), "utf-8")
        variables = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        command = [python, str(SCRIPT), str(folder / "task.json")]
        started = cpu_seconds_of_children()
        subprocess.run(command, env=os.environ | variables, stdout=sys.stderr, check=True)
        cpu_seconds = cpu_seconds_of_children() - started
        answer = json.loads((folder / "answer.json").read_text("utf-8"))
        after = heldout_score(config, folder / "adapter")
    return {
        "before": before or heldout_score(config, None),
        "after": after,
        "seconds": round(answer["seconds"], 1),
        "cpu_seconds": round(cpu_seconds, 1),
        **{name: rounded(answer[name]) for name in ("rewards", "lengths", "grad_norms")},
    }


def cpu_seconds_of_children() -> float:
    """Return the processor time of all processes that this process started and that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def task_of(config: TrainConfig, environment: Environment, folder: Path) -> dict[str, Any]:
    """Return what TRL needs, and write the adapter that both libraries start from."""
    check_same_function(config)
    model, tokenizer = load_model(config.model.name, dtype=dtype_of(config.model))
    sampling = sampling_of(config, environment)
    policy = ModelPolicy(
        model,
        tokenizer,
        sampling,
        chat_template_kwargs=template_arguments_of(config.model, tokenizer),
    )
    count = config.run.steps * config.rollout.groups_per_step
    rows = [row_of(task, policy) for task in islice(environment.stream(config.run.seed), count)]
    adapters = adapt(model, config.adapter, config.model, config.run.seed)
    adapters.save(folder / "start", layout="peft")
    size = config.rollout.group_size
    passes = passes_of(config.rollout.groups_per_step, size)
    return {
        "model": str(find_model(config.model.name)),
        "adapter": str(folder / "start"),
        "output": str(folder),
        "environment": str(import_module(f"textpolicy_envs.{config.task.env}").__file__),
        "rows": rows,
        "group_size": size,
        "passes": passes,
        "rows_per_pass": config.rollout.groups_per_step * size // passes,
        "rates": rates_of(config),
        "weight_decay": config.trainer.weight_decay,
        "max_grad_norm": config.trainer.max_grad_norm,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "seed": config.run.seed,
        "threads": fast_cpu.enable().threads or os.cpu_count(),
    }


def check_same_function(config: TrainConfig) -> None:
    """Raise `ConfigError` if the config asks for what the script of TRL does not do."""
    trainer, rollout, plain = config.trainer, config.rollout, TrainConfig()
    same = {
        "algorithm": config.algorithm == plain.algorithm,
        "model.quantize": config.model.quantize is None,
        "trainer.mini_batches": trainer.mini_batches in (None, 1),
        "trainer.epochs": trainer.epochs in (None, 1),
        "rollout.steps_per_generation": rollout.steps_per_generation == 1,
        "rollout.refill_rounds": rollout.refill_rounds in (None, 1),
    }
    if other := [name for name, is_same in same.items() if not is_same]:
        raise ConfigError(
            f"TRL cannot be compared with these options: {', '.join(other)}. Its side computes "
            "plain GRPO on a float base. Leave out these options, or leave out --peer"
        )


def row_of(task: Task, policy: ModelPolicy) -> dict[str, Any]:
    """Return a row of TRL's data set: the prompt as the model reads it, and what the reward asks.

    Lists of dicts change in a data set, so the example is JSON text.
    """
    tokens = policy.encode(task.asked)
    prompt = policy.tokenizer.decode(tokens)
    example = json.dumps(dict(task.example))
    return {
        "prompt": prompt,
        "tokens": tokens,
        "text": prompt_text(task.prompt),
        "example": example,
    }


def passes_of(groups: int, size: int) -> int:
    """Return into how many equal parts of whole groups a step is cut, to fit into memory."""
    fitting = (parts for parts in range(1, groups) if groups % parts == 0)
    return next((p for p in fitting if groups // p * size <= _ROWS_PER_PASS), groups)


def rates_of(config: TrainConfig) -> list[float]:
    """Return the learning rate of each update, as the optimizer of the config computes it."""
    optimizer = optimizer_of(config.trainer, config.run.steps)
    weights = {"weight": mx.zeros(1)}
    rates: list[float] = []
    for _ in range(config.run.steps):
        optimizer.apply_gradients({"weight": mx.zeros(1)}, weights)
        rates.append(float(optimizer.learning_rate))
    return rates


def heldout_score(config: TrainConfig, adapter: Path | None) -> dict[str, float]:
    """Return the greedy reward on the held-out tasks that `textpolicy train` measures."""
    environment, rewards = find_task(config.task, config.run.seed)
    model, tokenizer = load_model(config.model.name, adapter, dtype=dtype_of(config.model))
    policy = ModelPolicy(
        model,
        tokenizer,
        sampling_of(config, environment),
        chat_template_kwargs=template_arguments_of(config.model, tokenizer),
    )
    with scorer_of(rewards) as scorer:
        tasks = environment.heldout(config.evaluation.count)
        return recorded_score(evaluate_greedy(policy, tasks, scorer))
