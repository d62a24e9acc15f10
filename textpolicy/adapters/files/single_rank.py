"""The same adapter with one rank and one scale for all modules."""

from dataclasses import replace

import mlx.core as mx

from textpolicy.adapters.adapter import Adapter, group_by_module, join_module_tensors
from textpolicy.adapters.config.adapter_config import config_for_modules


def with_single_rank(adapter: Adapter) -> Adapter:
    """Return an adapter that computes the same with one rank and one scale for all modules.

    A library that knows one rank and one scale would silently scale some modules wrongly. Here each
    scale is multiplied into B, and factors of lower rank are padded with zeros.
    """
    rules = adapter.rules_by_module()
    if len({(rule.rank, rule.scale) for rule in rules.values()}) == 1:
        return adapter
    rank = max(rule.rank for rule in rules.values())
    modules = group_by_module(adapter.arrays)
    for path, tensors in modules.items():
        axis_a, axis_b = (1, 2) if tensors["lora_a"].ndim == 3 else (1, 0)
        tensors["lora_a"] = _pad(tensors["lora_a"], axis_a, rank)
        tensors["lora_b"] = _pad(tensors["lora_b"] * rules[path].scale, axis_b, rank)
    made = {path: replace(rule, rank=rank, scale=1.0) for path, rule in rules.items()}
    config = config_for_modules(made, adapter.config.quantize_only_rules)
    return replace(adapter, arrays=join_module_tensors(modules), config=config)


def _pad(factor: mx.array, axis: int, rank: int) -> mx.array:
    widths = [(0, 0)] * factor.ndim
    widths[axis] = (0, rank - factor.shape[axis])
    return mx.pad(factor, widths)
