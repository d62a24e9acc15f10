"""Weighted sums of LoRA adapters, as one adapter.

An update is s A B, with A inputs x rank and B rank x outputs. The sum of several of them is one
product of their factors side by side, which is exact. PEFT's "linear" multiplies sums of factors
instead, sum sqrt(w s) A times sum sqrt(w s) B, and so has products of one adapter's A with
another's B in it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from textpolicy.adapters.active_adapter import explicit_config, quantizing
from textpolicy.adapters.adapter import Adapter, group_by_module, join_module_tensors, rank_of
from textpolicy.adapters.config.rules import LoRARule
from textpolicy.adapters.files.single_rank import rules_by_path
from textpolicy.errors import AdapterError, ConfigError

METHODS = ("linear", "cat", "svd")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """What one adapter adds to one module. Factors are inputs x rank and rank x outputs."""

    weight: float
    scale: float
    a: mx.array
    b: mx.array
    bias: mx.array | None

    @property
    def factor(self) -> float:
        return self.weight * self.scale


def combine(
    name: str,
    like: Adapter,
    adapters: Mapping[str, Adapter],
    weights: Mapping[str, float],
    method: str,
    rank: int | None,
) -> Adapter:
    """A weighted sum of adapters of the base of `like`. One that has no part in a module adds 0."""
    _check(adapters, method, rank)
    parts: dict[str, list[_Part]] = {}
    rules: dict[str, LoRARule] = {}
    for one, adapter in adapters.items():
        own = rules_by_path(adapter)
        rules = own | rules
        for path, tensors in group_by_module(adapter.arrays).items():
            parts.setdefault(path, []).append(_part(weights[one], own[path], tensors))
    modules = {path: _combined(path, some, method, rank) for path, some in parts.items()}
    made = {path: _rule(rules[path], tensors) for path, tensors in modules.items()}
    config = explicit_config(made, quantizing(like.config))
    return replace(like, origin=name, arrays=join_module_tensors(modules), config=config, version=0)


def _check(adapters: Mapping[str, Adapter], method: str, rank: int | None) -> None:
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}; expected one of {list(METHODS)}")
    if not adapters:
        raise ConfigError("weights is empty; expected at least one name of an adapter and a number")
    if rank is not None and (method != "svd" or rank < 1):
        raise ConfigError(f"rank is {rank} for method {method!r}; expected one above 0, for 'svd'")
    for name, adapter in adapters.items():
        modules = group_by_module(adapter.arrays)
        if dora := sorted(path for path, tensors in modules.items() if "m" in tensors):
            raise AdapterError(
                f"{name!r} has DoRA on {dora[0]} and {len(dora) - 1} more: lengths of rows do not "
                "add up, so it cannot be combined. Fuse one adapter, then train or load the other"
            )


def _part(weight: float, rule: LoRARule, tensors: Mapping[str, mx.array]) -> _Part:
    a, b = tensors["lora_a"], tensors["lora_b"]
    if a.ndim == 3:
        a, b = a.swapaxes(-1, -2), b.swapaxes(-1, -2)
    return _Part(weight=weight, scale=rule.scale, a=a, b=b, bias=tensors.get("lora_bias"))


def _combined(path: str, parts: list[_Part], method: str, rank: int | None) -> dict[str, mx.array]:
    a, b = _linear(path, parts) if method == "linear" else _beside(parts)
    if method == "svd":
        a, b = _nearest(a, b, rank or max(part.a.shape[-1] for part in parts))
    if a.ndim == 3:
        a, b = a.swapaxes(-1, -2), b.swapaxes(-1, -2)
    offsets = [part.weight * part.bias for part in parts if part.bias is not None]
    bias = {"lora_bias": sum(offsets, mx.zeros(()))} if offsets else {}
    return {"lora_a": a, "lora_b": b} | bias


def _beside(parts: list[_Part]) -> tuple[mx.array, mx.array]:
    a = mx.concatenate([part.a * part.factor for part in parts], axis=-1)
    return a, mx.concatenate([part.b for part in parts], axis=-2)


def _linear(path: str, parts: list[_Part]) -> tuple[mx.array, mx.array]:
    if len(ranks := {part.a.shape[-1] for part in parts}) > 1:
        raise AdapterError(
            f"{path}: factors of ranks {sorted(ranks)} cannot be summed; use method 'cat' or 'svd'"
        )
    roots = [math.sqrt(abs(part.factor)) for part in parts]
    # The sign goes into one of the factors: in both it would cancel.
    signed = [math.copysign(root, part.factor) for root, part in zip(roots, parts, strict=True)]
    a = sum((root * part.a for root, part in zip(signed, parts, strict=True)), mx.zeros(()))
    b = sum((root * part.b for root, part in zip(roots, parts, strict=True)), mx.zeros(()))
    return a, b


def _nearest(a: mx.array, b: mx.array, rank: int) -> tuple[mx.array, mx.array]:
    """The product of `rank` that is nearest to A B, without ever making A B."""
    qa, ra = np.linalg.qr(np.array(a).astype(np.float64))
    qb, rb = np.linalg.qr(np.array(b).astype(np.float64).swapaxes(-1, -2))
    u, s, v = np.linalg.svd(ra @ rb.swapaxes(-1, -2), full_matrices=False)
    left = qa @ (u * s[..., None, :])[..., :rank]
    right = v[..., :rank, :] @ qb.swapaxes(-1, -2)
    return mx.array(left.astype(np.float32)), mx.array(right.astype(np.float32))


def _rule(rule: LoRARule, tensors: Mapping[str, mx.array]) -> LoRARule:
    return replace(rule, rank=rank_of(tensors) or rule.rank, scale=1.0, bias="lora_bias" in tensors)
