"""The folder that PEFT loads: adapter_model.safetensors and adapter_config.json.

PEFT's factors are the transposes of ours. PEFT multiplies the trained bias (`lora_bias`) by the
scale; this library does not. If a model's output head is its embedding table, PEFT stores the
table's adapter a second time, transposed, for the head.
"""

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
    name_path_in_errors,
    read_facts,
)
from textpolicy.adapters.files.mlx_folder import CONFIG_FILE, read_adapter_config, write_json_file
from textpolicy.adapters.files.tensor_file import read_tensors, write_tensors
from textpolicy.adapters.quantization.stored_weights import is_quantized
from textpolicy.errors import AdapterError

PEFT_TENSOR_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_HEAD = "lm_head"
_METADATA_PREFIX = "textpolicy_"
# The product of rank and scale can differ from a whole alpha by a rounding error.
_ROUNDING = 1e-12
# The names of our tensors by the names of PEFT's tensors.
_LINEAR_NAMES = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_B.bias": "lora_bias",
    "lora_magnitude_vector": "m",
}
_EMBEDDING_NAMES = {"lora_embedding_A": "lora_a", "lora_embedding_B": "lora_b"}
_NAMES = _LINEAR_NAMES | _EMBEDDING_NAMES


def read_peft_folder(folder: Path) -> Adapter:
    """Return the adapter in a folder that PEFT or this library wrote."""
    data = read_adapter_config(folder)
    arrays, metadata = read_tensors(folder / PEFT_TENSOR_FILE)
    tied = bool(data.get("ensure_weight_tying"))
    if data.get("fan_in_fan_out"):
        raise AdapterError(
            f"{folder / CONFIG_FILE} has fan_in_fan_out: its base has Conv1D layers (GPT-2), whose "
            "adapters are not supported. Merge the adapter with PEFT and load the result as a model"
        )
    if tied:
        # The head's adapter is that of the table.
        for pattern in ("rank_pattern", "alpha_pattern"):
            data[pattern] = {n: own for n, own in (data.get(pattern) or {}).items() if n != _HEAD}
    with name_path_in_errors(folder):
        config = AdapterConfig.from_peft(data, trained=True)
    modules, embeddings = _read_modules(folder, arrays)
    if tied and embeddings:
        _drop_tied_head(folder, modules, embeddings)
    for path, tensors in modules.items():
        if "lora_bias" in tensors:
            tensors["lora_bias"] *= config.selection.rule_for(path).scale
    adapter = Adapter(
        origin=str(folder),
        arrays=join_module_tensors(modules),
        config=config,
        embedding_lookup_only=bool(embeddings) and not tied,
    )
    ours = {
        name.removeprefix(_METADATA_PREFIX): text
        for name, text in metadata.items()
        if name.startswith(_METADATA_PREFIX)
    }
    return replace(adapter, **read_facts(folder, ours)) if has_our_format(ours) else adapter


def write_peft_folder(
    folder: Path, adapter: Adapter, model: nn.Module, *, over_float_base: bool
) -> None:
    """Write both files of the folder, each in one step. `model` must be without adapters."""
    layout = read_model_layout(model)
    rules = adapter.rules_by_module()
    _refuse_unsupported(rules, layout, model, over_float_base)
    modules = group_by_module(adapter.arrays)
    named = {path: _rename(modules[path], rule, path, layout) for path, rule in rules.items()}
    tied = {} if layout.has_head else {path: _HEAD for path in rules if _is_table(path, layout)}
    for path in tied:
        named[_HEAD] = {
            "lora_A.weight": modules[path]["lora_b"],
            "lora_B.weight": modules[path]["lora_a"],
        }
    tensors = join_module_tensors(named)
    arrays = {f"{_PREFIX}{name}": mx.contiguous(array) for name, array in tensors.items()}
    metadata = {f"{_METADATA_PREFIX}{k}": text for k, text in adapter_metadata(adapter).items()}
    write_json_file(folder / CONFIG_FILE, _make_config(rules, tied))
    # PyTorch's readers require the format "pt".
    write_tensors(folder / PEFT_TENSOR_FILE, arrays, {"format": "pt"} | metadata)


def _make_config(rules: Mapping[str, LoRARule], tied: Mapping[str, str]) -> dict[str, Any]:
    """Return adapter_config.json: modules by whole paths, and patterns for ranks and alphas.

    `tied` maps each embedding table to the head that PEFT adapts with it.
    """
    every = {**rules, **{head: rules[path] for path, head in tied.items()}}
    ranks = {path: rule.rank for path, rule in every.items()}
    alphas = {path: _as_whole_number(rule.scale * rule.rank) for path, rule in every.items()}
    rank, alpha = _most_common(ranks), _most_common(alphas)
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
    """Return tensors with our names and axes by module path, and the paths of embedding tables."""
    modules: dict[str, dict[str, mx.array]] = {}
    embeddings: list[str] = []
    unknown: list[str] = []
    for name, array in arrays.items():
        # PEFT writes copies of adapted embedding tables too.
        if name.endswith(".base_layer.weight"):
            continue
        peft_name = next((end for end in _NAMES if name.endswith(f".{end}")), None)
        if peft_name is None or not name.startswith(_PREFIX):
            unknown.append(name)
            continue
        path = name.removeprefix(_PREFIX).removesuffix(f".{peft_name}")
        modules.setdefault(path, {})[_NAMES[peft_name]] = array.T if array.ndim == 2 else array
        if peft_name in _EMBEDDING_NAMES and path not in embeddings:
            embeddings.append(path)
    if unknown:
        raise AdapterError(
            f"{folder / PEFT_TENSOR_FILE} has {sorted(unknown)[0]} and {len(unknown) - 1} more "
            "tensors that are not LoRA or DoRA weights (modules_to_save?). Merge the adapter with "
            "PEFT (merge_and_unload) and load the result as a model"
        )
    return modules, embeddings


def _drop_tied_head(
    folder: Path, modules: dict[str, dict[str, mx.array]], embeddings: list[str]
) -> None:
    """Remove the head's adapter, or raise if it is not the transpose of the table's adapter."""
    table, head = modules[embeddings[0]], modules.pop(_HEAD, None)
    if head is None:
        return
    same = mx.array_equal(head["lora_a"], table["lora_b"].T) & mx.array_equal(
        head["lora_b"], table["lora_a"].T
    )
    if not bool(same):
        raise AdapterError(
            f"{folder / PEFT_TENSOR_FILE}: {_HEAD} and {embeddings[0]} are tied, but their "
            "adapters differ. The file may have been changed after training. Train again, or merge "
            "the adapter with PEFT"
        )


def _rename(
    tensors: Mapping[str, mx.array], rule: LoRARule, path: str, layout: ModelLayout
) -> dict[str, mx.array]:
    """Return a module's tensors with PEFT's names and axes."""
    names = _EMBEDDING_NAMES if _is_table(path, layout) else _LINEAR_NAMES
    renamed = {theirs: tensors[ours] for theirs, ours in names.items() if ours in tensors}
    if "lora_bias" in tensors:
        renamed["lora_B.bias"] = tensors["lora_bias"] / rule.scale
    return {name: array.T if array.ndim == 2 else array for name, array in renamed.items()}


def _is_table(path: str, layout: ModelLayout) -> bool:
    return layout.adaptable[path].kind == "embedding"


def _as_whole_number(alpha: float) -> int | float:
    # Some readers accept only whole numbers.
    nearest = round(alpha)
    return nearest if abs(alpha - nearest) < _ROUNDING * abs(alpha) else alpha


def _most_common(numbers: Mapping[str, Any]) -> Any:
    return Counter(numbers.values()).most_common(1)[0][0]


def _refuse_unsupported(
    rules: Mapping[str, LoRARule], layout: ModelLayout, model: nn.Module, over_float_base: bool
) -> None:
    """Raise AdapterError with everything that PEFT's layout cannot hold."""
    problems: list[str] = []
    if len(kinds := {(rule.kind, rule.bias) for rule in rules.values()}) > 1:
        problems.append(f"its modules have kinds and bias {sorted(kinds)}; PEFT has one for all")
    if ("dora", True) in kinds:
        problems.append("it has DoRA with a bias; PEFT has no DoRA with a bias")
    for path, rule in rules.items():
        if layout.adaptable[path].kind == "experts":
            problems.append(f"{path}: PEFT names each expert by itself, differently for each model")
        elif _is_table(path, layout) and rule.kind == "dora":
            problems.append(f"{path}: PEFT's DoRA gives magnitudes to features instead of tokens")
    if any(is_quantized(module) for module in model.modules()) and not over_float_base:
        problems.append(
            "its base is quantized, and over the float base that PEFT loads it computes something "
            "else (pass over_float_base=True to save it for a float base)"
        )
    if problems:
        raise AdapterError(
            "PEFT's layout cannot hold this adapter\n  " + "\n  ".join(problems) + "\nFuse it, or "
            "publish it as one file for this library"
        )
