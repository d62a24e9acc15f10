"""PEFT's folder: adapter_model.safetensors and adapter_config.json.

Its factors are the transposes of ours. An offset of the output (`lora_bias`) is multiplied by the
scale there, and not here. Where a model ties its head to its embedding table, PEFT stores the
adapter of the table a second time, transposed, for the head.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from textpolicy.adapters.adapter import Adapter, group_by_module, join_module_tensors
from textpolicy.adapters.config.adapter_config import AdapterConfig
from textpolicy.adapters.config.model_layout import ModelLayout, read_model_layout
from textpolicy.adapters.config.rules import LoRARule
from textpolicy.adapters.files.adapter_file import (
    adapter_metadata,
    has_our_format,
    name_file_in_errors,
)
from textpolicy.adapters.files.mlx_folder import CONFIG_FILE, read_adapter_config, write_json_file
from textpolicy.adapters.files.single_rank import rules_by_path
from textpolicy.adapters.files.tensor_file import read_tensors, write_tensors
from textpolicy.adapters.quantization.stored_weights import is_quantized
from textpolicy.errors import AdapterError

PEFT_TENSOR_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_HEAD = "lm_head"
_OURS = "textpolicy_"
# Scales that were made of an alpha are off by a rounding when they become one again.
_ROUNDING = 1e-12
_LINEAR = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_B.bias": "lora_bias",
    "lora_magnitude_vector": "m",
}
_EMBEDDING = {"lora_embedding_A": "lora_a", "lora_embedding_B": "lora_b"}
_NAMES = _LINEAR | _EMBEDDING


def read_peft_folder(folder: Path) -> Adapter:
    """The adapter in a folder as PEFT writes it."""
    data = read_adapter_config(folder)
    arrays, metadata = read_tensors(folder / PEFT_TENSOR_FILE)
    tied = bool(data.get("ensure_weight_tying"))
    if data.get("fan_in_fan_out"):
        raise AdapterError(
            f"{folder / CONFIG_FILE} has fan_in_fan_out: its base has Conv1D layers (GPT-2), of "
            "which adapters are not supported. Merge it with PEFT and load the result as a model"
        )
    with name_file_in_errors(folder):
        config = AdapterConfig.from_peft(data, trained=True)
    modules, embeddings = _read_modules(folder, arrays)
    if tied and embeddings:
        _drop_head(folder, modules, embeddings)
    for path, tensors in modules.items():
        if "lora_bias" in tensors:
            tensors["lora_bias"] *= config.selection.rule_for(path).scale
    adapter = Adapter(
        origin=str(folder),
        arrays=join_module_tensors(modules),
        config=config,
        lookup_only=bool(embeddings) and not tied,
    )
    return _with_origin(adapter, metadata)


def write_peft_folder(
    folder: Path, adapter: Adapter, model: nn.Module, *, over_float_base: bool
) -> None:
    """Write the folder's two files, each in one step; `model` is without adapters."""
    layout = read_model_layout(model)
    rules = rules_by_path(adapter)
    _refuse(rules, layout, model, over_float_base)
    modules = group_by_module(adapter.arrays)
    named = {path: _theirs(modules[path], rule, path, layout) for path, rule in rules.items()}
    tied = {} if layout.has_head else {path: _HEAD for path in rules if _is_table(path, layout)}
    for path in tied:
        named[_HEAD] = {
            "lora_A.weight": modules[path]["lora_b"],
            "lora_B.weight": modules[path]["lora_a"],
        }
    arrays = {
        f"{_PREFIX}{name}": mx.contiguous(array)
        for name, array in join_module_tensors(named).items()
    }
    # PyTorch's readers ask for the format "pt", and look at nothing else.
    metadata = {f"{_OURS}{name}": text for name, text in adapter_metadata(adapter).items()}
    write_json_file(folder / CONFIG_FILE, peft_config(rules, tied))
    write_tensors(folder / PEFT_TENSOR_FILE, arrays, {"format": "pt"} | metadata)


def peft_config(rules: Mapping[str, LoRARule], tied: Mapping[str, str]) -> dict[str, Any]:
    """adapter_config.json: modules by their whole paths, and patterns for ranks and scales.

    `tied` maps embedding tables to the heads that PEFT adapts with them.
    """
    every = {**rules, **{head: rules[path] for path, head in tied.items()}}
    ranks = {path: rule.rank for path, rule in every.items()}
    # An alpha is a scale times the rank of its own module.
    alphas = {path: _number(rule.scale * rule.rank) for path, rule in every.items()}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    first = next(iter(rules.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(rule.dropout for rule in rules.values()),
        "rank_pattern": {path: own for path, own in ranks.items() if own != rank},
        "alpha_pattern": {path: own for path, own in alphas.items() if own != alpha},
        "target_modules": sorted(rules),
        "use_dora": first.kind == "dora",
        "use_rslora": False,
        "lora_bias": first.bias,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "ensure_weight_tying": bool(tied),
    }


def _read_modules(
    folder: Path, arrays: Mapping[str, mx.array]
) -> tuple[dict[str, dict[str, mx.array]], list[str]]:
    """Our tensors by path, and the paths of embedding tables."""
    modules: dict[str, dict[str, mx.array]] = {}
    embeddings: list[str] = []
    strange: list[str] = []
    for name, array in arrays.items():
        # PEFT adds copies of the base's embeddings where they are adapted.
        if name.endswith(".base_layer.weight"):
            continue
        theirs = next((end for end in _NAMES if name.endswith(f".{end}")), None)
        if theirs is None or not name.startswith(_PREFIX):
            strange.append(name)
            continue
        path = name.removeprefix(_PREFIX).removesuffix(f".{theirs}")
        modules.setdefault(path, {})[_NAMES[theirs]] = array.T if array.ndim == 2 else array
        if theirs in _EMBEDDING and path not in embeddings:
            embeddings.append(path)
    if strange:
        raise AdapterError(
            f"{folder / PEFT_TENSOR_FILE} has {sorted(strange)[0]} and {len(strange) - 1} "
            "more tensors that are no LoRA or DoRA weights (modules_to_save?). Merge it with PEFT "
            "(merge_and_unload) and load the result as a model"
        )
    return modules, embeddings


def _drop_head(
    folder: Path, modules: dict[str, dict[str, mx.array]], embeddings: list[str]
) -> None:
    """Leave out the head's copy of the table's adapter, if that is what it is."""
    table, head = modules[embeddings[0]], modules.pop(_HEAD, None)
    if head is None:
        return
    same = mx.array_equal(head["lora_a"], table["lora_b"].T) & mx.array_equal(
        head["lora_b"], table["lora_a"].T
    )
    if not bool(same):
        raise AdapterError(
            f"{folder / PEFT_TENSOR_FILE}: {_HEAD} and {embeddings[0]} are tied and their adapters "
            "differ; was the file changed after training? Train again, or merge it with PEFT"
        )


def _with_origin(adapter: Adapter, metadata: Mapping[str, str]) -> Adapter:
    """With version and base, where this library wrote the folder."""
    ours = {
        name.removeprefix(_OURS): text for name, text in metadata.items() if name.startswith(_OURS)
    }
    if not has_our_format(ours):
        return adapter
    with name_file_in_errors(Path(adapter.origin)):
        return replace(
            adapter,
            version=int(ours["version"]),
            fingerprint=ours["base_fingerprint"] or None,
            quantization=json.loads(ours["base_quantization"]),
        )


def _theirs(
    tensors: Mapping[str, mx.array], rule: LoRARule, path: str, layout: ModelLayout
) -> dict[str, mx.array]:
    names = _EMBEDDING if _is_table(path, layout) else _LINEAR
    renamed = {theirs: tensors[ours] for theirs, ours in names.items() if ours in tensors}
    if "lora_bias" in tensors:
        renamed["lora_B.bias"] = tensors["lora_bias"] / rule.scale
    return {name: array.T if array.ndim == 2 else array for name, array in renamed.items()}


def _is_table(path: str, layout: ModelLayout) -> bool:
    return layout.sites[path].kind == "embedding"


def _number(alpha: float) -> int | float:
    """A whole number as such: some readers take no other."""
    nearest = round(alpha)
    return nearest if abs(alpha - nearest) < _ROUNDING * abs(alpha) else alpha


def _commonest(numbers: Mapping[str, Any]) -> Any:
    return Counter(numbers.values()).most_common(1)[0][0]


def _refuse(
    rules: Mapping[str, LoRARule], layout: ModelLayout, model: nn.Module, over_float_base: bool
) -> None:
    """Say everything that PEFT has no place for."""
    problems: list[str] = []
    if len(kinds := {(rule.kind, rule.bias) for rule in rules.values()}) > 1:
        problems.append(f"its modules have kinds and bias {sorted(kinds)}; PEFT has one for all")
    if ("dora", True) in kinds:
        problems.append("PEFT has no DoRA with a bias")
    for path, rule in rules.items():
        if layout.sites[path].kind == "experts":
            problems.append(f"{path}: PEFT names every expert by itself, each model in its way")
        elif _is_table(path, layout) and rule.kind == "dora":
            problems.append(f"{path}: PEFT's DoRA gives lengths to features instead of tokens")
    if any(is_quantized(module) for module in model.modules()) and not over_float_base:
        problems.append(
            "its base is quantized; over the float base that PEFT loads it computes something else "
            "(say over_float_base=True if that is meant)"
        )
    if problems:
        raise AdapterError(
            "PEFT's layout cannot hold this adapter\n  " + "\n  ".join(problems) + "\nFuse it, or "
            "publish it as one file for this library"
        )
