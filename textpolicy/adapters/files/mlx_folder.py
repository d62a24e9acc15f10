"""The folder that mlx-lm and mlx-swift-lm load: adapters.safetensors and adapter_config.json.

Its config has one kind, one rank and one scale for all modules. The tensor file is an adapter file
of this library too, with version and base in its header.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.nn as nn

from textpolicy.adapters.adapter import Adapter, group_by_module
from textpolicy.adapters.config.adapter_config import AdapterConfig
from textpolicy.adapters.config.json_formats import write_selection
from textpolicy.adapters.config.model_layout import ModelLayout, read_model_layout
from textpolicy.adapters.config.selection import LastBlocks
from textpolicy.adapters.files.adapter_file import (
    adapter_metadata,
    has_our_format,
    name_path_in_errors,
    read_adapter_file,
)
from textpolicy.adapters.files.single_rank import with_single_rank
from textpolicy.adapters.files.tensor_file import read_tensors, write_tensors
from textpolicy.adapters.quantization.nf4 import NF4Module
from textpolicy.errors import AdapterError, UnreadableError
from textpolicy.file_writing import atomic_replace
from textpolicy.untrusted.parsing import read_json_object

CONFIG_FILE = "adapter_config.json"
MLX_TENSOR_FILE = "adapters.safetensors"


def read_mlx_folder(folder: Path) -> Adapter:
    """Return the adapter in a folder of mlx-lm's layout."""
    file = folder / MLX_TENSOR_FILE
    arrays, metadata = read_tensors(file)
    if has_our_format(metadata):
        return read_adapter_file(file)
    with name_path_in_errors(folder):
        config = AdapterConfig.from_dict(read_adapter_config(folder))
    names = ("lora_a", "lora_b", "m")
    if others := [name for name in arrays if name.rpartition(".")[2] not in names]:
        raise AdapterError(
            f"{file} has {others[0]} and {len(others) - 1} more tensors that are not adapters. If "
            "all weights were trained (fine_tune_type 'full'), load the folder as a model"
        )
    return Adapter(origin=str(folder), arrays=arrays, config=config)


def write_mlx_folder(
    folder: Path, adapter: Adapter, model: nn.Module, *, over_float_base: bool
) -> None:
    """Write both files of the folder, each in one step. `model` must be without adapters."""
    _refuse_unsupported(adapter, model, over_float_base)
    adapter = with_single_rank(adapter)
    write_json_file(folder / CONFIG_FILE, _make_config(adapter, read_model_layout(model)))
    write_tensors(folder / MLX_TENSOR_FILE, adapter.arrays, adapter_metadata(adapter))


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return the JSON object in the folder's adapter_config.json."""
    try:
        return read_json_object(folder / CONFIG_FILE)
    except UnreadableError as error:
        raise AdapterError(
            f"No adapter can be read from {folder}: {error}. If the writer was interrupted, write "
            "the folder again"
        ) from error


def write_json_file(path: Path, data: Mapping[str, Any]) -> None:
    """Replace a JSON file in one step."""
    with atomic_replace(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _make_config(adapter: Adapter, layout: ModelLayout) -> dict[str, Any]:
    rule = next(iter(adapter.rules_by_module().values()))
    num_layers, keys = _name_modules(list(group_by_module(adapter.arrays)), layout)
    return write_selection(LastBlocks(num_layers=num_layers, keys=keys, rule=rule))


def _name_modules(paths: list[str], layout: ModelLayout) -> tuple[int, list[str]]:
    """Return num_layers and keys that select exactly these modules.

    Keys are paths inside blocks, as mlx-swift-lm needs them, if such keys select exactly these
    modules. Otherwise keys are whole paths, which only mlx-lm understands.
    """
    blocks = layout.blocks or ()
    chosen = [layout.adaptable[path] for path in paths]
    keys = list(dict.fromkeys(one.key for one in chosen))
    first = min(-1 if one.block is None else one.block for one in chosen)
    last_blocks = list(blocks[max(0, first) :])
    if {f"{block}.{key}" for block in last_blocks for key in keys} == set(paths):
        return len(last_blocks), keys
    return layout.depth(), paths


def _refuse_unsupported(adapter: Adapter, model: nn.Module, over_float_base: bool) -> None:
    kinds = sorted({rule.kind for rule in adapter.rules_by_module().values()})
    if len(kinds) > 1:
        raise AdapterError(
            f"mlx-lm's config has one kind for all modules, but this adapter has {kinds}. Publish "
            "it as one file for this library, or fuse it"
        )
    if biased := [name for name in adapter.arrays if name.endswith(".lora_bias")]:
        raise AdapterError(
            f"mlx-lm's adapters have no bias, but this adapter has {biased[0]} and "
            f"{len(biased) - 1} more. Save it for PEFT, publish it as one file for this library, "
            "or fuse it"
        )
    nf4 = any(isinstance(module, NF4Module) for module in model.modules())
    if nf4 and not over_float_base:
        raise AdapterError(
            "These adapters belong to a base in NF4, which mlx-lm cannot load. Over a float base "
            "they compute something else. Fuse them, or pass over_float_base=True to save them for "
            "a float base"
        )
