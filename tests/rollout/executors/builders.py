"""What rollout workers of tests are built by: a worker's process imports these functions."""

import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.nn as nn

from textpolicy.adapters import AdapterConfig, AdapterContainer
from textpolicy.environments import load
from textpolicy.errors import ConfigError
from textpolicy.generation.mlx_generation import create_policy, load_model
from textpolicy.generation.policy import ModelPolicy
from textpolicy.rewards import Rewards
from textpolicy.rollout.executors.rollout_worker import RolloutWorker
from textpolicy.types import Sampling


def adapted_model(seed: int = 1) -> tuple[nn.Module, AdapterContainer, Any]:
    """Return the embedded model with adapters, the adapters, and the tokenizer."""
    model, tokenizer = load_model("tiny")
    return model, AdapterContainer.from_model(model, AdapterConfig(rank=2), seed=seed), tokenizer


def add_policy(seed: int = 1) -> ModelPolicy:
    """Return a policy for sums. Its adapters do not depend on those of the trainer."""
    model, _, tokenizer = adapted_model(seed)
    return create_policy(model, tokenizer, {"max_tokens": 4})


def obey(prompt: str, completion: str, example: Mapping[str, Any]) -> float:
    """Do what the task says in the worker's process, and return the reward of the sum."""
    match example.get("do", "add"):
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "die once" if not (mark := Path(example["mark"])).exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(600)
        case "hang once" if not (mark := Path(example["mark"])).exists():
            mark.touch()
            time.sleep(600)
        case "fail":
            raise RuntimeError("the reward of the user is broken")
        case _:
            pass
    return load("add").reward(prompt, completion, example)


def add_worker() -> RolloutWorker:
    """Return a worker with other adapters than the trainer's until it follows a version."""
    return RolloutWorker(add_policy(seed=7), obey)


def add_worker_with_processes() -> RolloutWorker:
    """Return a worker whose rewards run in two processes of their own."""
    return RolloutWorker(add_policy(seed=7), Rewards(obey, timeout=600, workers=2))


def swapping_worker() -> RolloutWorker:
    """Return a worker that takes new adapters between the tokens of long answers."""
    model, _, tokenizer = adapted_model()
    sampling = Sampling(max_tokens=48, temperature=3.0)
    return RolloutWorker(ModelPolicy(model, tokenizer, sampling, swap="tokens"), obey)


def dying_worker() -> RolloutWorker:
    """End the process at once."""
    os._exit(9)


def refusing_worker() -> RolloutWorker:
    """Print, and raise an error that the user must read."""
    print("printed in a worker")
    print("an error in a worker", file=sys.stderr)
    raise ConfigError("the worker has no model")
