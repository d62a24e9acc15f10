"""LoRA and QLoRA set-up from plain options; each function delegates to `textpolicy.adapters`.

The options are lora_layers (the number of last blocks to adapt, or all blocks if the model has
fewer), lora_rank, lora_scale, lora_dropout and lora_keys. The defaults are those of
`AdapterConfig`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from textpolicy.adapters.config.adapter_config import AdapterConfig, find_target_modules
from textpolicy.adapters.config.json_formats import LORA_OPTIONS, refuse_unknown_options
from textpolicy.adapters.config.model_layout import read_model_layout
from textpolicy.adapters.container import AdapterContainer, shared_copy
from textpolicy.adapters.files.adapter_file import prepare_adapter_path
from textpolicy.adapters.layers.adapter_layer import freeze_base as freeze_base
from textpolicy.adapters.memory_stats import memory_stats
from textpolicy.adapters.quantization.quantize import quantize
from textpolicy.errors import AdapterError

ADAPTER_PATH = "./lora_adapters.safetensors"


def create_lora_setup(
    model: nn.Module,
    lora_config: Mapping[str, Any],
    auto_reload: bool = True,
    adapter_save_path: str | Path = ADAPTER_PATH,
) -> tuple[nn.Module, dict[str, int | float]]:
    """Adapt the model in place and freeze its base. Return the model and its measured memory.

    With `auto_reload` the trainer publishes the adapters to `adapter_save_path` after every
    update, and policies reload this file. Nothing is written before the first update.
    """
    config = _adapter_config(model, lora_config)
    path = prepare_adapter_path(adapter_save_path) if auto_reload else None
    container = AdapterContainer.from_model(model, config)
    container.publish_path = path
    return model, memory_stats(model)


def create_qlora_setup(
    model: nn.Module,
    lora_config: Mapping[str, Any],
    quantization_config: Mapping[str, Any],
    auto_reload: bool = True,
    adapter_save_path: str | Path = ADAPTER_PATH,
) -> tuple[nn.Module, dict[str, int | float]]:
    """Quantize the model in place, then do what `create_lora_setup` does.

    `quantization_config` has bits, group_size and mode. The returned memory also holds the
    measured bytes of the base before quantization, the factor and the percentage saved, and the
    number of modules that were not quantized because their rows do not divide into groups.
    """
    known = ["bits", "group_size", "mode"]
    refuse_unknown_options("quantization_config", quantization_config, known)
    # Quantization cannot be undone, so these calls raise before anything changes.
    find_target_modules(model, _adapter_config(model, lora_config))
    if auto_reload:
        prepare_adapter_path(adapter_save_path)
    report = quantize(model, **quantization_config)
    model, stats = create_lora_setup(model, lora_config, auto_reload, adapter_save_path)
    return model, stats | {
        "base_bytes_before_quantization": report.bytes_before,
        "quantization_factor": report.bytes_before / report.bytes_after,
        "quantization_savings_percent": 100 * (1 - report.bytes_after / report.bytes_before),
        "modules_left_unquantized": len(report.left_out),
    }


def apply_lora(model: nn.Module, **lora_config: Any) -> nn.Module:
    """Adapt the model in place, freeze its base, and return the model. Publishes nowhere."""
    AdapterContainer.from_model(model, _adapter_config(model, lora_config))
    return model


def extract_params(model: nn.Module) -> dict[str, mx.array]:
    """Return the adapter tensors by their names in the model."""
    return adapters_of(model).parameters()


def merge_weights(
    model: nn.Module, *, dtype: mx.Dtype | None = None, min_survival: float = 0.9
) -> nn.Module:
    """Add the adapters to the weights in place, and return the plain model.

    This is `AdapterContainer.fuse` without its report. An error is raised if less than
    `min_survival` of the update is left after rounding to `dtype`, by default the dtype of the
    weights. Adapted modules of a quantized base become float.
    """
    return adapters_of(model).merge_and_unload(dtype=dtype, min_survival=min_survival)


def compute_lora_memory_savings(
    model: nn.Module, lora_rank: int, lora_layers: int = -1
) -> dict[str, int | float]:
    """Return the `memory_stats` of the model with such adapters. The model stays unchanged."""
    copy = shared_copy(model)
    apply_lora(copy, lora_rank=lora_rank, lora_layers=lora_layers)
    return memory_stats(copy)


def adapters_of(model: nn.Module) -> AdapterContainer:
    """Return the model's adapters. Raise AdapterError if it has none."""
    container = AdapterContainer.of(model)
    if container is None:
        raise AdapterError("The model has no adapters. Apply some first (create_lora_setup)")
    return container


def _adapter_config(model: nn.Module, options: Mapping[str, Any]) -> AdapterConfig:
    refuse_unknown_options("lora_config", options, list(LORA_OPTIONS))
    words = {LORA_OPTIONS[name]: value for name, value in options.items()}
    if isinstance(layers := words.get("num_layers"), int):
        words["num_layers"] = min(layers, read_model_layout(model).depth())
    return AdapterConfig(**words)
