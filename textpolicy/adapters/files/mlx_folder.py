"""The folder that mlx-lm and mlx-swift-lm load: adapters.safetensors and adapter_config.json.

Its config knows one kind, one rank and one scale for all modules. The tensors' file is one of this
library's own at the same time, with version and base in its header.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.nn as nn

from textpolicy.adapters.adapter import Adapter, group_by_module, split_tensor_name
from textpolicy.adapters.config.adapter_config import AdapterConfig
from textpolicy.adapters.config.model_layout import ModelLayout, read_model_layout
from textpolicy.adapters.files.adapter_file import (
    adapter_metadata,
    has_our_format,
    name_file_in_errors,
    read_adapter_file,
)
from textpolicy.adapters.files.single_rank import rules_by_path, to_single_rank
from textpolicy.adapters.files.tensor_file import atomic_replace, read_tensors, write_tensors
from textpolicy.adapters.quantization.nf4 import NF4Embedding, NF4Linear
from textpolicy.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
MLX_TENSOR_FILE = "adapters.safetensors"


def read_mlx_folder(folder: Path) -> Adapter:
    """The adapter in a folder of mlx-lm's layout, whoever wrote it."""
    file = folder / MLX_TENSOR_FILE
    arrays, metadata = read_tensors(file)
    if has_our_format(metadata):
        return read_adapter_file(file)
    with name_file_in_errors(folder):
        config = AdapterConfig.from_dict(read_adapter_config(folder))
    if others := [
        name for name in arrays if split_tensor_name(name)[1] not in ("lora_a", "lora_b", "m")
    ]:
        raise AdapterError(
            f"{file} has {others[0]} and {len(others) - 1} more tensors that are no adapters; were "
            "all weights trained (fine_tune_type 'full')? Load them as a model"
        )
    return Adapter(origin=str(folder), arrays=arrays, config=config)


def write_mlx_folder(
    folder: Path, adapter: Adapter, model: nn.Module, *, over_float_base: bool
) -> None:
    """Write the folder's two files, each in one step; `model` is without adapters."""
    _refuse(adapter, model, over_float_base)
    adapter = to_single_rank(adapter)
    config = mlx_config(adapter, read_model_layout(model))
    write_json_file(folder / CONFIG_FILE, config)
    write_tensors(folder / MLX_TENSOR_FILE, adapter.arrays, adapter_metadata(adapter))


def mlx_config(adapter: Adapter, layout: ModelLayout) -> dict[str, Any]:
    """adapter_config.json of an adapter with one rank and scale.

    Keys are paths inside blocks, as mlx-swift-lm needs them, if these and the number of blocks
    name just the adapted modules; else whole paths, which mlx-lm alone understands.
    """
    rule = next(iter(rules_by_path(adapter).values()))
    num_layers, keys = _keys(list(group_by_module(adapter.arrays)), layout)
    return {
        "fine_tune_type": rule.kind,
        "num_layers": num_layers,
        "lora_parameters": {
            "rank": rule.rank,
            "scale": rule.scale,
            "dropout": rule.dropout,
            "keys": keys,
        },
    }


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The JSON object in a folder's adapter_config.json."""
    path = folder / CONFIG_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(f"no adapter can be read from {folder}: {path}: {error}") from error
    except ValueError as error:
        raise AdapterError(f"{path} is not JSON ({error}): was its writing cut off?") from error
    if not isinstance(data, dict):
        raise AdapterError(f"{path} holds a {type(data).__name__}; expected a JSON object")
    return data


def write_json_file(path: Path, data: Mapping[str, Any]) -> None:
    """Replace a JSON file in one step."""
    with atomic_replace(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _keys(paths: list[str], layout: ModelLayout) -> tuple[int, list[str]]:
    blocks = layout.blocks or ()
    sites = [layout.sites[path] for path in paths]
    keys = list(dict.fromkeys(site.key for site in sites))
    numbers = [-1 if site.block is None else site.block for site in sites]
    last = list(blocks[max(0, min(numbers)) :])
    if {f"{block}.{key}" for block in last for key in keys} == set(paths):
        return len(last), keys
    return layout.depth(), paths


def _refuse(adapter: Adapter, model: nn.Module, over_float_base: bool) -> None:
    kinds = sorted({rule.kind for rule in rules_by_path(adapter).values()})
    if len(kinds) > 1:
        raise AdapterError(
            f"mlx-lm's config has one kind for all modules, and this adapter has {kinds}. Publish "
            "it as one file for this library, or fuse it"
        )
    if biased := [name for name in adapter.arrays if split_tensor_name(name)[1] == "lora_bias"]:
        raise AdapterError(
            f"mlx-lm's adapters have no bias, and this one has {biased[0]} and {len(biased) - 1} "
            "more. Save it for PEFT, publish it as one file for this library, or fuse it"
        )
    nf4 = any(isinstance(module, NF4Linear | NF4Embedding) for module in model.modules())
    if nf4 and not over_float_base:
        raise AdapterError(
            "these adapters are of a base in NF4, which mlx-lm cannot load: over a float base they "
            "compute something else. Fuse them, or say over_float_base=True if that is meant"
        )
