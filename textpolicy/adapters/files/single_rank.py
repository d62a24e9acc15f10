"""Rewriting an adapter of several ranks and scales as an adapter with one rank and one scale.

A library that knows one rank and one scale for all modules would silently scale some modules
wrongly. The rewritten adapter computes the same: each scale is multiplied into B, and factors of
lower rank are padded with zeros.
"""

from collections.abc import Mapping
from dataclasses import replace

import mlx.core as mx

from textpolicy.adapters.adapter import Adapter, group_by_module, join_module_tensors
from textpolicy.adapters.config.adapter_config import config_for_modules


def to_single_rank(adapter: Adapter) -> Adapter:
    """Return the same function with one rank and one scale."""
    rules = adapter.rules_by_module()
    if len({(rule.rank, rule.scale) for rule in rules.values()}) == 1:
        return adapter
    rank = max(rule.rank for rule in rules.values())
    modules = {
        path: _pad_tensors(tensors, rules[path].scale, rank)
        for path, tensors in group_by_module(adapter.arrays).items()
    }
    made = {path: replace(rule, rank=rank, scale=1.0) for path, rule in rules.items()}
    config = config_for_modules(made, adapter.config.quantization_rules)
    return replace(adapter, arrays=join_module_tensors(modules), config=config)


def _pad_tensors(tensors: Mapping[str, mx.array], scale: float, rank: int) -> dict[str, mx.array]:
    a, b = tensors["lora_a"], tensors["lora_b"] * scale
    axes = (1, 2) if a.ndim == 3 else (1, 0)
    return {**tensors, "lora_a": _pad(a, axes[0], rank), "lora_b": _pad(b, axes[1], rank)}


def _pad(factor: mx.array, axis: int, rank: int) -> mx.array:
    widths = [(0, 0)] * factor.ndim
    widths[axis] = (0, rank - factor.shape[axis])
    return mx.pad(factor, widths)
