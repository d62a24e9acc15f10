"""write_gguf_lora: an adapter as the GGUF file that llama.cpp applies to a base model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from textpolicy.adapters.adapter import Adapter, group_by_module
from textpolicy.adapters.config.rules import LoRARule
from textpolicy.adapters.files.adapter_file import adapter_metadata
from textpolicy.adapters.files.gguf_layout import (
    MODEL_TYPES,
    GGUFFamily,
    Heads,
    family_of,
    restore_row_order,
    tensor_name,
    to_pairs,
)
from textpolicy.adapters.files.gguf_lora import DIGEST_KEY, METADATA_PREFIX, content_digest
from textpolicy.errors import AdapterError
from textpolicy.export.gguf.gguf_package import tensor_in_memory, write_gguf_file

_EMBEDDING = "model.embed_tokens"


def write_gguf_lora(
    path: str | Path,
    adapter: Adapter,
    architecture: Mapping[str, Any],
    *,
    over_float_base: bool = False,
) -> Path:
    """Write an adapter for llama.cpp, replacing the file in one step, and return its path.

    `architecture` is the content of the base model's config.json. An adapter of a quantized base
    computes something else over another base, so it is refused unless `over_float_base` is True.
    Raise AdapterError for all that llama.cpp would not compute as it was trained.
    """
    rules = adapter.rules_by_module()
    family = _check(adapter, rules, architecture, over_float_base)
    heads = Heads.of(architecture)
    if adapter.rows_in_pairs:
        adapter = restore_row_order(adapter, heads)
    # The file has one alpha, and llama.cpp multiplies by alpha / rank.
    alpha = float(mx.array(_alpha_of(next(iter(rules.values())))))
    arrays: dict[str, mx.array] = {}
    for module, own in group_by_module(adapter.arrays).items():
        factor = _alpha_of(rules[module]) / alpha
        a, b = _file_factors(own, module, family, heads)
        name = f"{tensor_name(module)}.weight"
        arrays |= {f"{name}.lora_a": a, f"{name}.lora_b": b * factor if factor != 1 else b}
    metadata = {
        "general.type": "adapter",
        "general.name": "textpolicy adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
        # llama.cpp does not read these. They restore the order of the rows without the model.
        f"{family.name}.attention.head_count": heads.queries,
        f"{family.name}.attention.head_count_kv": heads.keys,
        **{f"{METADATA_PREFIX}{key}": text for key, text in adapter_metadata(adapter).items()},
    }
    whole = metadata | {"general.architecture": family.name}
    metadata[DIGEST_KEY] = content_digest(whole, arrays)
    tensors = {name: tensor_in_memory(array) for name, array in arrays.items()}
    return write_gguf_file(Path(path), family.name, metadata, tensors)


def _alpha_of(rule: LoRARule) -> float:
    return rule.scale * rule.rank


def _file_factors(
    tensors: Mapping[str, mx.array], module: str, family: GGUFFamily, heads: Heads
) -> tuple[mx.array, mx.array]:
    """Return A and B with the axes and the row order of GGUF files."""
    if tensors["lora_a"].ndim == 3:
        # Factors of experts have the same axes in both.
        return tensors["lora_a"], tensors["lora_b"]
    a, b = tensors["lora_a"], tensors["lora_b"].T
    rotated = heads.rotated_in(module) if family.rotates_pairs else None
    if rotated is not None:
        b = to_pairs(b, rotated)
    # A of an embedding is a table of tokens already, and of a linear layer it is transposed.
    return (a if module == _EMBEDDING else a.T), b


def _check(
    adapter: Adapter,
    rules: Mapping[str, LoRARule],
    architecture: Mapping[str, Any],
    over_float_base: bool,
) -> GGUFFamily:
    """Return the family; raise AdapterError with everything that llama.cpp would not compute."""
    family = family_of(architecture.get("model_type"))
    if family is None:
        raise AdapterError(
            f"A GGUF adapter cannot be written for the model type "
            f"{architecture.get('model_type')!r}; supported are {', '.join(MODEL_TYPES)}. Write "
            "the adapter in the format peft or mlx-lm"
        )
    problems: list[str] = []
    for module, rule in rules.items():
        if rule.kind == "dora":
            problems.append(f"{module}: llama.cpp has no DoRA")
        if rule.bias:
            problems.append(f"{module}: llama.cpp's adapters have no bias")
        if tensor_name(module) is None:
            problems.append(f"{module}: it has no name in GGUF files")
    if architecture.get("tie_word_embeddings", True) and _EMBEDDING in rules:
        problems.append(
            f"{_EMBEDDING}: it is the model's output head too, where llama.cpp does not adapt it"
        )
    if adapter.quantization is not None and not over_float_base:
        problems.append(
            "its base is quantized, and over the base that llama.cpp loads it computes something "
            "else (pass over_float_base=True to write it for a float base)"
        )
    if problems:
        shown = [*problems[:8], *([f"... and {len(problems) - 8} more"] if problems[8:] else [])]
        raise AdapterError(
            "A GGUF adapter cannot hold this adapter\n  " + "\n  ".join(shown) + "\nWrite the "
            "merged model in the format gguf instead"
        )
    return family
