"""Reading an adapter in a GGUF file, by this library or by llama.cpp's convert_lora_to_gguf.

llama.cpp multiplies B (A x) by alpha / rank, or by 1 if alpha is 0.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from textpolicy.adapters.adapter import Adapter, join_module_tensors
from textpolicy.adapters.config.adapter_config import config_for_modules
from textpolicy.adapters.config.rules import LoRARule
from textpolicy.adapters.files.adapter_file import has_our_format, read_facts
from textpolicy.adapters.files.gguf_file import parse_gguf
from textpolicy.adapters.files.gguf_layout import (
    FAMILIES,
    GGUFFamily,
    Heads,
    module_path,
    restore_row_order,
)
from textpolicy.errors import AdapterError, UnreadableError
from textpolicy.untrusted.files import open_regular

METADATA_PREFIX = "textpolicy."
DIGEST_KEY = "textpolicy.content_sha256"
"""The metadata that holds `content_digest`. Files of other programs have none."""
_FACTOR = re.compile(r"(.+)\.weight\.lora_([ab])")
_EMBEDDING = "model.embed_tokens"
_EXPERTS = ".switch_mlp."
_ALPHA = "adapter.lora.alpha"
_INVOCATION = "adapter.alora.invocation_tokens"


def read_gguf_lora(path: str | Path) -> Adapter:
    """Return the adapter of a GGUF file, evaluated, so that replacing the file has no effect."""
    path = Path(path)
    try:
        with open_regular(path) as file:
            content = parse_gguf(memoryview(file.read()))
    except UnreadableError as error:
        raise AdapterError(
            f"{path} cannot be read as a GGUF adapter: {error}. Write the file again"
        ) from error
    metadata = content.metadata
    family = _check_kind(path, metadata)
    alpha = metadata.get(_ALPHA, 0.0)
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise AdapterError(f"{path} has {_ALPHA} {alpha!r}; expected a finite number of type f32")
    arrays = {name: tensor.read() for name, tensor in content.tensors.items()}
    if metadata.get(DIGEST_KEY, digest := content_digest(metadata, arrays)) != digest:
        raise AdapterError(
            f"{path} is damaged: its content differs from what was written. Write the file again"
        )
    modules = {
        module: _own_factors(path, module, factors)
        for module, factors in _group_by_module(path, arrays).items()
    }
    rules = {
        module: LoRARule(rank=rank, scale=alpha / rank if alpha else 1.0)
        for module, own in modules.items()
        for rank in [own["lora_b"].shape[-1 if own["lora_b"].ndim == 3 else 0]]
    }
    adapter = Adapter(
        origin=str(path),
        arrays=join_module_tensors(modules),
        config=config_for_modules(rules),
        embedding_lookup_only=_EMBEDDING in modules,
        rows_in_pairs=family.rotates_pairs,
    )
    if family.rotates_pairs and (heads := _read_heads(metadata, family)):
        adapter = restore_row_order(adapter, heads)
    mx.eval(adapter.arrays)
    ours = {
        key.removeprefix(METADATA_PREFIX): value
        for key, value in metadata.items()
        if key.startswith(METADATA_PREFIX) and isinstance(value, str)
    }
    return replace(adapter, **read_facts(path, ours)) if has_our_format(ours) else adapter


def content_digest(metadata: Mapping[str, Any], arrays: Mapping[str, mx.array]) -> str:
    """Return the SHA-256 of what a file must hold unchanged: metadata, and tensors in float32."""
    kept = {key: metadata[key] for key in sorted(metadata.keys() - {DIGEST_KEY})}
    digest = hashlib.sha256(json.dumps(kept).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].shape}".encode())
        digest.update(np.array(arrays[name].astype(mx.float32)).tobytes())
    return digest.hexdigest()


def _check_kind(path: Path, metadata: Mapping[str, Any]) -> GGUFFamily:
    """Return the family of the base. Raise AdapterError if the file is no adapter for LoRA."""
    kinds = (metadata.get("general.type"), metadata.get("adapter.type"))
    if kinds != ("adapter", "lora"):
        raise AdapterError(
            f"{path} is a GGUF file of the kind {kinds[0]!r}, adapter type {kinds[1]!r}; expected "
            "an 'adapter' of the type 'lora'. A GGUF file of a whole model is not read here: pass "
            "the folder with config.json and *.safetensors as --model"
        )
    if _INVOCATION in metadata:
        raise AdapterError(
            f"{path} is an adapter that starts at an invocation text (aLoRA), which is not "
            "supported. Use an adapter for all tokens"
        )
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in FAMILIES:
        raise AdapterError(
            f"{path} is for the architecture {name!r}; adapters for {', '.join(FAMILIES)} are "
            "read. Load the folder that PEFT or mlx-lm wrote"
        )
    return FAMILIES[name]


def _group_by_module(path: Path, arrays: Mapping[str, mx.array]) -> dict[str, dict[str, mx.array]]:
    """Return "a" and "b" by the paths of modules."""
    modules: dict[str, dict[str, mx.array]] = {}
    unknown: list[str] = []
    for name, array in arrays.items():
        match = _FACTOR.fullmatch(name)
        if match is None or (module := module_path(match[1])) is None:
            unknown.append(name)
            continue
        modules.setdefault(module, {})[match[2]] = array
    if unknown or not modules:
        found = f"{min(unknown)!r} and {len(unknown) - 1} more" if unknown else "no"
        raise AdapterError(
            f"{path} has {found} tensors; expected LoRA weights of linear layers and embeddings "
            "only. Load the folder that PEFT or mlx-lm wrote"
        )
    return modules


def _own_factors(path: Path, module: str, factors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Return A and B with our names and axes."""
    shapes = {name: array.shape for name, array in factors.items()}
    axes = 3 if _EXPERTS in module else 2
    ranks = {
        shape[-1] if name == "b" or module == _EMBEDDING else shape[-2]
        for name, shape in shapes.items()
        if len(shape) == axes
    }
    if len(shapes) != 2 or len(ranks) != 1 or {len(s) for s in shapes.values()} != {axes}:
        raise AdapterError(
            f"{path}: {module} has factors of the shapes {shapes}; expected two of {axes} axes and "
            "of one rank. Write the file again"
        )
    a, b = factors["a"], factors["b"]
    if axes == 3:
        return {"lora_a": a, "lora_b": b}
    # A of an embedding is a table of tokens, as here.
    return {"lora_a": a if module == _EMBEDDING else a.T, "lora_b": b.T}


def _read_heads(metadata: Mapping[str, Any], family: GGUFFamily) -> Heads | None:
    """Return the numbers of heads, which files of this library hold, or None."""
    numbers = [metadata.get(f"{family.name}.attention.head_count{kv}") for kv in ("", "_kv")]
    queries, keys = (number if type(number) is int and number > 0 else None for number in numbers)
    return Heads(queries, keys) if queries and keys else None
