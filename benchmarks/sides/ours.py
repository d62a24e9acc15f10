"""Steps of TextPolicy: its training loop, including files and reloading."""

import tempfile
from itertools import cycle
from pathlib import Path
from typing import Any

import mlx.core as mx
from protocol import Steps, read_task, reward_of

from textpolicy import fast_cpu
from textpolicy.adapters import AdapterConfig, AdapterContainer, shared_copy
from textpolicy.algorithms import grpo
from textpolicy.generation.mlx_generation import create_policy, load_model
from textpolicy.loop import StepReport, train_rl
from textpolicy.training.optimizer import build_optimizer
from textpolicy.training.trainer import Trainer
from textpolicy.types import Progress, Task

TIMES = ("generate", "reward", "logprobs", "update", "publish", "reload")
MANY = 1_000_000


def main() -> None:
    steps, task = Steps(), read_task()
    if fast_cpu.enable().threads:
        fast_cpu.set_threads(task["threads"])
    model, tokenizer = load_model(task["model"], dtype=getattr(mx, task["dtype"]))
    peak_name = "gpu_peak" if mx.default_device().type == mx.gpu else "mlx_peak"
    config = AdapterConfig(rank=task["rank"], scale=task["scale"], num_layers=task["layers"])
    with tempfile.TemporaryDirectory() as folder:
        adapters = AdapterContainer.from_model(model, config)
        adapters.publish_path = Path(folder) / "adapters.safetensors"
        policy = create_policy(
            shared_copy(model), tokenizer, {"max_tokens": task["completion_tokens"], "seed": 0}
        )
        trainer = Trainer(
            model,
            grpo.compute_advantages,
            lambda logp, batch: grpo.policy_loss(logp, batch, beta=task["beta"]),
            build_optimizer(task["learning_rate"]),
            reference="base" if task["beta"] else None,
            skip_without_advantages=not task["beta"],
        )

        def on_step(report: StepReport) -> Progress:
            measured = {name: report.metrics[f"time/{name}"] for name in TIMES}
            peak = report.metrics["memory/peak_gb"] * 1e9
            steps.done(**measured, **{peak_name: peak})
            return Progress.MORE if steps.wait() else Progress.STOP

        steps.ready(mlx=mx.__version__, blas=fast_cpu.enable().name)
        if steps.wait():
            train_rl(
                tasks=cycle(tasks_of(task)),
                reward=lambda prompt, completion, example: reward_of(completion),
                policy=policy,
                trainer=trainer,
                steps=MANY,
                groups_per_step=len(task["prompts"]),
                group_size=task["group_size"],
                on_step=on_step,
            )
    steps.end()


def tasks_of(task: dict[str, Any]) -> list[Task]:
    """Return one task for each prompt."""
    return [Task(id=str(number), prompt=prompt) for number, prompt in enumerate(task["prompts"])]


if __name__ == "__main__":
    main()
