"""An adapter of many ranks and scales as one that has a single rank and a single scale.

Readers that know one rank and one scale for all modules would scale the others wrongly and say
nothing. The function stays the same: scales are multiplied into B, and ranks filled with zeros.
"""

from collections.abc import Mapping
from dataclasses import replace

import mlx.core as mx

from textpolicy.adapters.active_adapter import explicit_config, quantizing
from textpolicy.adapters.adapter import Adapter, group_by_module, join_module_tensors, rank_of
from textpolicy.adapters.config.rules import LoRARule


def rules_by_path(adapter: Adapter) -> dict[str, LoRARule]:
    """The rule of every module that has tensors, with the rank that they have."""
    return {
        path: replace(adapter.config.selection.rule_for(path), rank=rank_of(tensors) or 1)
        for path, tensors in group_by_module(adapter.arrays).items()
    }


def to_single_rank(adapter: Adapter) -> Adapter:
    """The same function with one rank and one scale; itself, if it has these already."""
    rules = rules_by_path(adapter)
    if len({(rule.rank, rule.scale) for rule in rules.values()}) == 1:
        return adapter
    rank = max(rule.rank for rule in rules.values())
    modules = {
        path: _padded(tensors, rules[path].scale, rank)
        for path, tensors in group_by_module(adapter.arrays).items()
    }
    made = {path: replace(rule, rank=rank, scale=1.0) for path, rule in rules.items()}
    config = explicit_config(made, quantizing(adapter.config))
    return replace(adapter, arrays=join_module_tensors(modules), config=config)


def _padded(tensors: Mapping[str, mx.array], scale: float, rank: int) -> dict[str, mx.array]:
    a, b = tensors["lora_a"], tensors["lora_b"] * scale
    axes = (1, 2) if a.ndim == 3 else (1, 0)
    return {**tensors, "lora_a": _filled(a, axes[0], rank), "lora_b": _filled(b, axes[1], rank)}


def _filled(factor: mx.array, axis: int, rank: int) -> mx.array:
    widths = [(0, 0)] * factor.ndim
    widths[axis] = (0, rank - factor.shape[axis])
    return mx.pad(factor, widths)
