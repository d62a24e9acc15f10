"""Trainers of the embedded model with adapters, and rollouts for them."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import count
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from textpolicy.adapters import AdapterConfig, AdapterContainer
from textpolicy.algorithms import grpo
from textpolicy.generation.mlx_generation import create_policy, load_model
from textpolicy.rollout.worker import collect
from textpolicy.training.trainer import Trainer
from textpolicy.types import Rollout, RolloutGroup, Task

TASKS = [Task(id=str(i), prompt=p) for i, p in enumerate(["1+2=", "Sort 52431", "?", "ab" * 9])]
TIME_METRICS = {"time/logprobs", "time/update", "time/publish"}
Reward = Callable[[str, str, Any], float | None]


def length_reward(prompt: str, completion: str, example: Any) -> float:
    return len(completion) % 5 / 4


def constant_reward(prompt: str, completion: str, example: Any) -> float:
    return 0.5


def rising_reward() -> Reward:
    """Return a reward without equal values, so that every group has signal."""
    numbers = count()
    return lambda prompt, completion, example: float(next(numbers))


def adapted_model(*, trained: bool = True) -> tuple[nn.Module, Any]:
    """Return the embedded model with adapters, which differ from the base if `trained`."""
    model, tokenizer = load_model("tiny", dtype=mx.float32)
    adapters = AdapterContainer.from_model(model, AdapterConfig(rank=4, scale=2.0))
    key = mx.random.key(1)
    noise = {n: mx.random.normal(v.shape, key=key) * 0.01 for n, v in adapters.parameters().items()}
    if not trained:
        noise = {n: mx.zeros_like(v) if n.endswith("lora_b") else v for n, v in noise.items()}
    adapters.swap(noise, version=0)
    return model, tokenizer


def sample(model: nn.Module, tokenizer: Any, *, size: int = 3, seed: int = 0) -> list[RolloutGroup]:
    """Return a group of `size` rollouts of at most ten tokens for each task."""
    policy = create_policy(model, tokenizer, {"max_tokens": 10})
    return collect(TASKS, policy, length_reward, group_size=size, seed=seed)


@cache
def _groups_of_adapted_model(trained: bool) -> list[RolloutGroup]:
    return sample(*adapted_model(trained=trained))


def make_trainer(
    *, reward: Reward = length_reward, trained: bool = True, **options: Any
) -> tuple[nn.Module, Trainer, list[RolloutGroup]]:
    """Return an adapted model, its trainer (by default GRPO and SGD), and rollouts of the model."""
    model, _ = adapted_model(trained=trained)
    groups = change_rollouts(
        _groups_of_adapted_model(trained), lambda r, m: {"reward": reward("", r.completion, None)}
    )
    defaults = {
        "advantage_fn": grpo.compute_advantages,
        "loss_fn": grpo.policy_loss,
        "optimizer": optim.SGD(learning_rate=1.0),
    }
    return model, Trainer(model, **(defaults | options)), groups


def change_rollouts(
    groups: list[RolloutGroup], changes: Callable[[Rollout, int], dict[str, Any]]
) -> list[RolloutGroup]:
    """Return the groups with fields changed; `changes` takes a rollout and its number."""
    return [
        replace(g, rollouts=[replace(r, **changes(r, m)) for m, r in enumerate(g.rollouts)])
        for g in groups
    ]


def weights(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(model.parameters())}


def distance(model: nn.Module, before: dict[str, np.ndarray]) -> float:
    """Return the Euclidean distance of the model's weights from those before."""
    after = weights(model)
    return math.sqrt(sum(float(((after[n] - before[n]) ** 2).sum()) for n in before))


def assert_same_weights(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Assert that no weight differs by 1e-6 or more."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() < 1e-6, name
