"""Saving adapters, and policies that reload adapters without loading the base model again."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy.adapters.container import shared_copy
from textpolicy.generation.lora import ADAPTER_PATH, adapters_of, create_lora_setup
from textpolicy.generation.mlx_generation import create_policy, load_model
from textpolicy.generation.policy import ModelPolicy

ReloadFn = Callable[[str | Path], int]


def save_adapters(model: nn.Module, path: str | Path, *, layout: str | None = None) -> int:
    """Write the model's adapters as one file, replaced in one step, and return their version.

    With `layout`, `path` is a folder that mlx-lm and mlx-swift-lm ("mlx") or PEFT ("peft") load.
    """
    adapters = adapters_of(model)
    if layout is None:
        return adapters.publish(path)
    adapters.save(path, layout=layout)
    return adapters.version


def reload_model(
    base_model_path: str | Path,
    adapter_path: str | Path,
    tokenizer_config: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, TokenizerWrapper]:
    """Load the base model and put the adapters of a file or folder into it.

    The file also holds the adapter config. A base that was quantized for QLoRA is quantized in the
    same way again.
    """
    return load_model(base_model_path, adapter_path, tokenizer_config)


def create_reloadable_policy(
    base_model_path: str | Path,
    initial_adapter_path: str | Path | None,
    generation_params: Mapping[str, Any] | None = None,
) -> tuple[ModelPolicy, ReloadFn]:
    """Return a policy, and a function that makes the policy use the adapters of another file."""
    model, tokenizer = load_model(base_model_path, initial_adapter_path)
    policy = create_policy(model, tokenizer, generation_params)
    return policy, policy.reload


def create_auto_reload_setup(
    model_path: str | Path, adapter_save_path: str | Path = ADAPTER_PATH, **generation_params: Any
) -> tuple[ModelPolicy, ReloadFn, nn.Module, TokenizerWrapper]:
    """Return a policy, its reload function, a model to train, and the tokenizer.

    The policy reloads the adapters that the model's trainer publishes. Options that begin with
    lora_ configure the adapters, all other options the policy. The policy's model is a shared copy
    of the model to train, and samples with the version that it last reloaded.
    """
    lora_config = {k: v for k, v in generation_params.items() if k.startswith("lora_")}
    params = {k: v for k, v in generation_params.items() if k not in lora_config}
    model, tokenizer = load_model(model_path)
    model, _ = create_lora_setup(model, lora_config, adapter_save_path=adapter_save_path)
    policy = create_policy(
        shared_copy(model), tokenizer, params, follow=adapters_of(model).publish_path
    )
    return policy, policy.reload, model, tokenizer
