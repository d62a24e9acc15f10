"""Weighted sums of LoRA adapters, as one adapter.

An update is s A B, with A inputs x rank and B rank x outputs. The sum of several of them is one
product of their factors side by side, which is exact. PEFT's "linear" multiplies sums of factors
instead, sum sqrt(w s) A times sum sqrt(w s) B, and so has products of one adapter's A with
another's B in it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import mlx.core as mx
import numpy as np

from textpolicy.adapters.adapter import by_module, joined, rank_of
from textpolicy.adapters.config import AdapterConfig
from textpolicy.adapters.fit import Fitted, explicit_config
from textpolicy.adapters.rules import LoRARule
from textpolicy.errors import AdapterError, ConfigError

Method = Literal["linear", "cat", "svd"]


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
    adapters: Mapping[str, Fitted],
    weights: Mapping[str, float],
    method: Method,
    rank: int | None,
) -> tuple[dict[str, mx.array], AdapterConfig]:
    """The tensors and the config of a weighted sum. One that has no part in a module adds 0."""
    _check(adapters, method, rank)
    parts: dict[str, list[_Part]] = {}
    rules: dict[str, LoRARule] = {}
    for name, fitted in adapters.items():
        rules = fitted.present_rules() | rules
        for path, tensors in by_module(fitted.tensors()).items():
            part = _part(weights[name], fitted.present_rules()[path], tensors)
            parts.setdefault(path, []).append(part)
    modules = {path: _combined(path, some, method, rank) for path, some in parts.items()}
    config = explicit_config({path: _rule(rule, modules.get(path)) for path, rule in rules.items()})
    return joined(modules), config


def _check(adapters: Mapping[str, Fitted], method: str, rank: int | None) -> None:
    if method not in get_args(Method):
        raise ConfigError(f"method is {method!r}; expected one of {list(get_args(Method))}")
    if not adapters:
        raise ConfigError("weights is empty; expected at least one name of an adapter and a number")
    if rank is not None and (method != "svd" or rank < 1):
        raise ConfigError(f"rank is {rank} for method {method!r}; expected one above 0, for 'svd'")
    for name, fitted in adapters.items():
        if dora := [path for path, layer in fitted.layers.items() if layer.kind == "dora"]:
            raise AdapterError(
                f"{name!r} has DoRA on {dora[0]} and {len(dora) - 1} more: lengths of rows do not "
                "add up, so it cannot be combined. Fuse one adapter, then train or load the other"
            )


def _part(weight: float, rule: LoRARule, tensors: Mapping[str, mx.array]) -> _Part:
    a, b = tensors["lora_a"], tensors["lora_b"]
    if a.ndim == 3:
        a, b = a.swapaxes(-1, -2), b.swapaxes(-1, -2)
    return _Part(weight=weight, scale=rule.scale, a=a, b=b, bias=tensors.get("lora_bias"))


def _combined(
    path: str, parts: list[_Part], method: Method, rank: int | None
) -> dict[str, mx.array]:
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


def _rule(rule: LoRARule, tensors: Mapping[str, mx.array] | None) -> LoRARule:
    if tensors is None or (rank := rank_of(tensors)) is None:
        return rule
    return replace(rule, rank=rank, scale=1.0, bias="lora_bias" in tensors)
