"""Loading a model and making a policy of it."""

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy import fast_cpu
from textpolicy.adapters.container import AdapterContainer
from textpolicy.adapters.quantization.cpu_layers import use_fast_products
from textpolicy.errors import ConfigError, ModelError
from textpolicy.fast_cpu.model_functions import use_fast_functions
from textpolicy.generation.model_files import find_model
from textpolicy.generation.policy import ModelPolicy
from textpolicy.types import Sampling


def load_model(
    path_or_name: str | Path,
    adapter_path: str | Path | None = None,
    tokenizer_config: Mapping[str, Any] | None = None,
    *,
    dtype: mx.Dtype | None = None,
) -> tuple[nn.Module, TokenizerWrapper]:
    """The model, evaluated and in eval mode, with its tokenizer; with `adapter_path`, adapted.

    `dtype` is that of the unquantized weights: by default float32 on a CPU, where bfloat16 is
    many times slower, and the checkpoint's own on a GPU. Code in a checkpoint is never run.
    """
    fast_cpu.enable()
    folder = find_model(path_or_name)
    config = {"trust_remote_code": False, **(tokenizer_config or {})}
    try:
        model, tokenizer, *_ = mlx_lm.load(str(folder), tokenizer_config=config)
    except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        raise ModelError(f"cannot load the model in {folder}: {error}") from error
    if dtype is None and mx.default_device().type == mx.DeviceType.cpu:
        dtype = mx.float32
    if dtype is not None:
        model.set_dtype(dtype)
        mx.eval(model.parameters())
    use_fast_products(model)
    use_fast_functions(model)
    if adapter_path is not None:
        AdapterContainer.from_directory(adapter_path).load(model)
    return model, tokenizer


def create_policy(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    params: Mapping[str, Any] | None = None,
    *,
    follow: Path | None = None,
) -> ModelPolicy:
    """A policy that samples from `model` as it is at that moment: training it is seen at once.

    `params` are the fields of `Sampling` (max_tokens, temperature, top_p, top_k, min_p,
    repetition_penalty, stop) and `seed`. With `follow`, the policy swaps to the adapters in that
    file before a generation whenever they are new.
    """
    fast_cpu.enable()
    options = dict(params or {})
    seed = options.pop("seed", None)
    if not isinstance(seed, int | None):
        raise ConfigError(f"seed is {seed!r}; expected a whole number, or None for a random one")
    return ModelPolicy(model, tokenizer, _sampling(options), follow=follow, seed=seed)


def _sampling(options: dict[str, Any]) -> Sampling:
    known = [field.name for field in fields(Sampling)]
    for name in options:
        if name not in known:
            near = get_close_matches(name, [*known, "seed"], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ConfigError(f"unknown generation option {name!r}{hint} Known: {known}, 'seed'")
    if (stop := options.get("stop")) is not None:
        options["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    return Sampling(**options)
