"""TextPolicy: reinforcement-learning post-training of language models, on MLX.

Names are imported on first use, because mlx-lm and transformers take seconds to import and most
commands and scripts need only a part.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from textpolicy.backend import missing_backend, set_cuda_defaults

if TYPE_CHECKING:
    from textpolicy.adapters.config.adapter_config import AdapterConfig
    from textpolicy.adapters.config.rules import LoRARule
    from textpolicy.adapters.container import AdapterContainer
    from textpolicy.buffer import Buffer
    from textpolicy.config import SFTConfig, TrainConfig
    from textpolicy.experiment import Measurement, RunEvent, RunResult, run
    from textpolicy.export import Exported, export_adapter
    from textpolicy.export.push import push_export
    from textpolicy.generation.mlx_generation import create_policy, load_model
    from textpolicy.generation.model_files import tiny_model
    from textpolicy.loop import StepReport, train_rl
    from textpolicy.planning.memory_plan import plan_memory
    from textpolicy.rewards import Rewards, Sample, Score, reward, verifiers
    from textpolicy.rewards.reward_check import check_reward
    from textpolicy.rollout.worker import collect
    from textpolicy.training.sft import SFTParameters, evaluate_sft, train_sft
    from textpolicy.training.trainer import Trainer
    from textpolicy.types import (
        Batch,
        Completion,
        Policy,
        Progress,
        Rollout,
        RolloutGroup,
        Sampling,
        StopReason,
        Task,
    )

__version__ = "0.1.0"

set_cuda_defaults()

__all__ = [
    "AdapterConfig",
    "AdapterContainer",
    "Batch",
    "Buffer",
    "Completion",
    "Exported",
    "LoRARule",
    "Measurement",
    "Policy",
    "Progress",
    "Rewards",
    "Rollout",
    "RolloutGroup",
    "RunEvent",
    "RunResult",
    "SFTConfig",
    "SFTParameters",
    "Sample",
    "Sampling",
    "Score",
    "StepReport",
    "StopReason",
    "Task",
    "TrainConfig",
    "Trainer",
    "check_reward",
    "collect",
    "create_policy",
    "evaluate_sft",
    "export_adapter",
    "load_model",
    "plan_memory",
    "push_export",
    "reward",
    "run",
    "tiny_model",
    "train_rl",
    "train_sft",
    "verifiers",
]

_MODULES = {
    "textpolicy.adapters.config.adapter_config": ["AdapterConfig"],
    "textpolicy.adapters.config.rules": ["LoRARule"],
    "textpolicy.adapters.container": ["AdapterContainer"],
    "textpolicy.buffer": ["Buffer"],
    "textpolicy.config": ["SFTConfig", "TrainConfig"],
    "textpolicy.experiment": ["Measurement", "RunEvent", "RunResult", "run"],
    "textpolicy.export": ["Exported", "export_adapter"],
    "textpolicy.export.push": ["push_export"],
    "textpolicy.generation.mlx_generation": ["create_policy", "load_model"],
    "textpolicy.generation.model_files": ["tiny_model"],
    "textpolicy.loop": ["StepReport", "train_rl"],
    "textpolicy.planning.memory_plan": ["plan_memory"],
    "textpolicy.rewards": ["Rewards", "Sample", "Score", "reward"],
    "textpolicy.rewards.reward_check": ["check_reward"],
    "textpolicy.rollout.worker": ["collect"],
    "textpolicy.training.sft": ["SFTParameters", "evaluate_sft", "train_sft"],
    "textpolicy.training.trainer": ["Trainer"],
}
# Reached as `tp.rewards` too; other packages are imported by their names.
_PACKAGES = ("adapters", "algorithms", "environments", "rewards", "training")
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__ and name not in _PACKAGES:
        raise AttributeError(f"module 'textpolicy' has no attribute {name!r}")
    try:
        if name in _PACKAGES:
            return import_module(f"textpolicy.{name}")
        if name == "verifiers":
            return import_module("textpolicy.rewards.verifiers")
        return getattr(import_module(_MODULE_OF.get(name, "textpolicy.types")), name)
    except ImportError as error:
        if missing := missing_backend():
            raise ImportError(missing) from error
        raise


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
