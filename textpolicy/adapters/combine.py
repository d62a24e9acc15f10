"""combine_adapters: a weighted sum of LoRA adapters as one new adapter.

The update of one adapter is s A B, with A inputs x rank and B rank x outputs. The factors of
several adapters side by side give the exact sum of their updates. PEFT's "linear" method multiplies
sums of factors instead, (sum of sqrt(w s) A) times (sum of sqrt(w s) B), so it also contains
products of one adapter's A with another adapter's B.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from textpolicy.adapters.adapter import Adapter, group_by_module, join_module_tensors, rank_of
from textpolicy.adapters.config.adapter_config import config_for_modules
from textpolicy.adapters.config.rules import LoRARule
from textpolicy.adapters.container import AdapterContainer
from textpolicy.errors import AdapterError, ConfigError

_METHODS = ("linear", "cat", "svd")


class _WeightedUpdate(NamedTuple):
    """The update of one module by one adapter: `factor` times A (inputs x rank) times B."""

    factor: float
    a: mx.array
    b: mx.array


def combine_adapters(
    container: AdapterContainer,
    weights: Mapping[str, float],
    method: str = "cat",
    *,
    rank: int | None = None,
) -> Adapter:
    """Return a weighted sum of LoRA adapters of a container, to pass to `container.add`.

    "cat" is the exact sum; its rank is the sum of the ranks. "svd" is the best approximation of
    this sum with `rank`, by default the largest of the adapters' ranks. "linear" multiplies sums
    of the factors, as PEFT does: it keeps the rank and is not the sum. An adapter adds nothing to
    a module that it does not adapt.
    """
    adapters = {name: container.adapter(name) for name in weights}
    _check_arguments(adapters, method, rank)
    updates: dict[str, list[_WeightedUpdate]] = {}
    biases: dict[str, list[mx.array]] = {}
    rules: dict[str, LoRARule] = {}
    for name, adapter in adapters.items():
        own = adapter.rules_by_module()
        rules = own | rules
        for path, tensors in group_by_module(adapter.arrays).items():
            factor = weights[name] * own[path].scale
            a, b = _swap_expert_axes(tensors["lora_a"], tensors["lora_b"])
            updates.setdefault(path, []).append(_WeightedUpdate(factor, a, b))
            if "lora_bias" in tensors:
                biases.setdefault(path, []).append(weights[name] * tensors["lora_bias"])
    modules = {path: _combine(path, some, method, rank) for path, some in updates.items()}
    for path, some in biases.items():
        modules[path]["lora_bias"] = sum(some, mx.zeros(()))
    made = {
        path: replace(rules[path], rank=rank_of(some) or 1, scale=1.0, bias="lora_bias" in some)
        for path, some in modules.items()
    }
    active = container.adapter()
    return replace(
        active,
        origin=f"{method} of {', '.join(weights)}",
        arrays=join_module_tensors(modules),
        config=config_for_modules(made, active.config.quantize_only_rules),
        version=0,
    )


def _check_arguments(adapters: Mapping[str, Adapter], method: str, rank: int | None) -> None:
    if method not in _METHODS:
        raise ConfigError(f"method is {method!r}; expected one of {list(_METHODS)}")
    if not adapters:
        raise ConfigError("weights is empty; expected at least one name of an adapter and a number")
    if rank is not None and (method != "svd" or rank < 1):
        raise ConfigError(
            f"rank is {rank} for method {method!r}; expected a rank above 0 for 'svd', and no "
            "rank for the other methods"
        )
    for name, adapter in adapters.items():
        modules = group_by_module(adapter.arrays)
        if dora := sorted(path for path, tensors in modules.items() if "m" in tensors):
            raise AdapterError(
                f"{name!r} has DoRA on {dora[0]} and {len(dora) - 1} more. DoRA adapters cannot be "
                "combined, because magnitudes of rows do not add up. Fuse one adapter, then train "
                "or load the other"
            )


def _swap_expert_axes(a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
    """Exchange the last two axes of experts' factors, which mlx-lm stores in another order."""
    return (a.swapaxes(-1, -2), b.swapaxes(-1, -2)) if a.ndim == 3 else (a, b)


def _combine(
    path: str, updates: list[_WeightedUpdate], method: str, rank: int | None
) -> dict[str, mx.array]:
    if method == "linear":
        a, b = _sum_factors(path, updates)
    else:
        a = mx.concatenate([update.a * update.factor for update in updates], axis=-1)
        b = mx.concatenate([update.b for update in updates], axis=-2)
    if method == "svd":
        a, b = _truncate(a, b, rank or max(update.a.shape[-1] for update in updates))
    a, b = _swap_expert_axes(a, b)
    return {"lora_a": a, "lora_b": b}


def _sum_factors(path: str, updates: list[_WeightedUpdate]) -> tuple[mx.array, mx.array]:
    if len(ranks := {update.a.shape[-1] for update in updates}) > 1:
        raise AdapterError(
            f"{path}: factors of ranks {sorted(ranks)} cannot be summed; use method 'cat' or 'svd'"
        )
    roots = [math.sqrt(abs(update.factor)) for update in updates]
    # The sign goes into A only. In both factors it would cancel.
    signed = [math.copysign(root, u.factor) for root, u in zip(roots, updates, strict=True)]
    a = sum((root * u.a for root, u in zip(signed, updates, strict=True)), mx.zeros(()))
    b = sum((root * u.b for root, u in zip(roots, updates, strict=True)), mx.zeros(()))
    return a, b


def _truncate(a: mx.array, b: mx.array, rank: int) -> tuple[mx.array, mx.array]:
    """Return the factors of the best approximation of A B with this rank, without forming A B."""
    qa, ra = np.linalg.qr(np.array(a).astype(np.float64))
    qb, rb = np.linalg.qr(np.array(b).astype(np.float64).swapaxes(-1, -2))
    u, s, v = np.linalg.svd(ra @ rb.swapaxes(-1, -2), full_matrices=False)
    left = qa @ (u * s[..., None, :])[..., :rank]
    right = v[..., :rank, :] @ qb.swapaxes(-1, -2)
    return mx.array(left.astype(np.float32)), mx.array(right.astype(np.float32))
