"""Adapters put around a model's modules, and every reason at once why they cannot be."""

import re
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from textpolicy.adapters.adapter import Adapter, group_by_module, rank_of
from textpolicy.adapters.config.adapter_config import AdapterConfig
from textpolicy.adapters.config.model_layout import read_model_layout
from textpolicy.adapters.config.rules import LoRARule
from textpolicy.adapters.config.target_modules import TargetModule, find_target_modules
from textpolicy.adapters.layers.adapter_layer import AdapterLayer, tensor_shapes
from textpolicy.adapters.layers.layer_classes import new_layer
from textpolicy.adapters.quantization.stored_weights import module_kind, weight_shape
from textpolicy.errors import AdapterError

_SHOWN = 8
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(kw_only=True, slots=True)
class Fitted:
    """An adapter's layers around a model's modules: in the model, or ready to be put there.

    `rules` are of every path that the config speaks of, those that only quantize too.
    """

    config: AdapterConfig
    rules: Mapping[str, LoRARule]
    layers: MutableMapping[str, AdapterLayer]
    version: int = 0

    def tensors(self) -> dict[str, mx.array]:
        """The adapter tensors by their names in the model."""
        return {
            f"{path}.{name}": layer[name]
            for path, layer in self.layers.items()
            for name in layer.trainable
        }

    def present_rules(self) -> dict[str, LoRARule]:
        """The rules with the ranks and scales that the layers have now."""
        layers = self.layers
        return {path: _present_rule(rule, layers.get(path)) for path, rule in self.rules.items()}

    def present_config(self) -> AdapterConfig:
        """The config if it is true of the layers as they are now; else each module by its path."""
        rules = self.present_rules()
        return self.config if rules == self.rules else explicit_config(rules)


def fresh(model: nn.Module, config: AdapterConfig, seed: int = 0) -> Fitted:
    """New layers for an unadapted model, which stays as it is."""
    return _fitted(find_target_modules(model, config), config, seed)


def fit(model: nn.Module, adapter: Adapter, problems: Iterable[str] = ()) -> Fitted:
    """An adapter's layers for an unadapted model, which stays as it is.

    An error lists the `problems` given and everything about the tensors that does not fit.
    """
    targets = check_fit(model, adapter, problems)
    fitted = _fitted(targets, adapter.config)
    assign(fitted, adapter.arrays, fitted.rules)
    fitted.version = adapter.version
    return fitted


def check_fit(
    model: nn.Module, adapter: Adapter, problems: Iterable[str] = ()
) -> dict[str, TargetModule]:
    """The modules that an adapter is for; an error like that of `fit` if it does not fit them."""
    problems = [*problems, *lookup_problems(model, adapter)]
    targets = targets_of(model, adapter, problems)
    modules = {path: target.module for path, target in targets.items()}
    shapes = expected_shapes(modules, {path: target.rule for path, target in targets.items()})
    refuse_misfits(adapter.origin, problems, misfits(shapes, adapter.arrays))
    return targets


def targets_of(
    model: nn.Module, adapter: Adapter, problems: Iterable[str]
) -> dict[str, TargetModule]:
    """The modules that an adapter's config means; one error with `problems` if it means none."""
    try:
        return find_target_modules(model, adapter.config)
    except AdapterError as error:
        refuse_misfits(adapter.origin, problems, [str(error)])
        raise


def assign(fitted: Fitted, arrays: Mapping[str, mx.array], rules: Mapping[str, LoRARule]) -> None:
    """Give the layers other tensors, known to fit, and their rules' scale and dropout."""
    tensors = {name: array.astype(mx.float32) for name, array in arrays.items()}
    mx.eval(tensors)
    for path, layer in fitted.layers.items():
        for name in layer.trainable:
            layer[name] = tensors[f"{path}.{name}"]
        layer.retune(rules[path])
    fitted.rules = rules


def with_ranks_of(
    arrays: Mapping[str, mx.array], rules: Mapping[str, LoRARule]
) -> dict[str, LoRARule]:
    """The rules with the ranks that the tensors have, where they have one."""
    given = group_by_module(arrays)
    ranks = {path: rank for path in rules if (rank := rank_of(given.get(path, {})))}
    return {path: replace(rule, rank=ranks.get(path, rule.rank)) for path, rule in rules.items()}


def expected_shapes(
    modules: Mapping[str, nn.Module], rules: Mapping[str, LoRARule]
) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors that stand beside the modules under these rules."""
    return {
        f"{path}.{name}": shape
        for path, module in modules.items()
        if path in rules and rules[path].kind != "none" and (kind := module_kind(module))
        for name, shape in tensor_shapes(rules[path], kind, weight_shape(module)).items()
    }


def misfits(expected: Shapes, given: Mapping[str, mx.array]) -> list[str]:
    """One line for each tensor that is missing, unknown, misshapen, not float or not finite."""
    shared = [(name, given[name], expected[name]) for name in expected if name in given]
    floats = {name: array for name, array, _ in shared if mx.issubdtype(array.dtype, mx.floating)}
    return [
        *_shorten(f"{name}: missing" for name in expected if name not in given),
        *_shorten(f"{name}: no such adapter in the model" for name in given.keys() - expected),
        *_shorten(
            f"{name}: shape {array.shape}, model has {own}"
            for name, array, own in shared
            if array.shape != own
        ),
        *_shorten(
            f"{name}: {array.dtype}, expected floating point"
            for name, array, _ in shared
            if name not in floats
        ),
        *_shorten(f"{name}: not finite" for name, array in floats.items() if not is_finite(array)),
    ]


def refuse_misfits(origin: str, *problems: Iterable[str]) -> None:
    """Raise one error with all of the problems, if there are any."""
    if lines := [line for some in problems for line in some]:
        text = "\n  ".join([f"{origin}: not what the adapters of this model can hold", *lines])
        raise AdapterError(f"{text}\nWere they made with other options, or for another model?")


def is_finite(array: mx.array) -> bool:
    """Whether every number in an array is one."""
    # numpy looks at hundreds of small arrays ten times as fast as mlx schedules them.
    return bool(np.isfinite(np.array(array.astype(mx.float32), copy=False)).all())


def lookup_problems(model: nn.Module, adapter: Adapter) -> list[str]:
    """Embeddings adapted for the lookup alone, in a model that reads the same table as its head."""
    if not adapter.lookup_only or (layout := read_model_layout(model)).has_head:
        return []
    sites = [layout.sites[path] for path in group_by_module(adapter.arrays) if path in layout.sites]
    tables = [site.path for site in sites if site.kind == "embedding"]
    return [
        f"{path}: adapted for looking tokens up alone, but it is the model's output head too. "
        "Train with PEFT's ensure_weight_tying=True, or leave embeddings out"
        for path in tables
    ]


def explicit_config(
    rules: Mapping[str, LoRARule], others: Iterable[LoRARule] = ()
) -> AdapterConfig:
    """Rules that name every module by its whole path, those of one kind together; then `others`."""
    paths: dict[tuple[object, ...], list[str]] = {}
    kinds: dict[tuple[object, ...], LoRARule] = {}
    for path, rule in rules.items():
        plain = replace(rule, module_path=".*")
        key = tuple(getattr(plain, name) for name in plain.__slots__)
        kinds[key] = plain
        paths.setdefault(key, []).append(re.escape(path))
    named = [replace(rule, module_path="|".join(paths[key])) for key, rule in kinds.items()]
    return AdapterConfig(rules=[*named, *others])


def quantizing(config: AdapterConfig) -> list[LoRARule]:
    """The rules that adapt nothing, but say how the base is quantized."""
    return [rule for rule in config.rules if rule.kind == "none"]


def _fitted(targets: Mapping[str, TargetModule], config: AdapterConfig, seed: int = 0) -> Fitted:
    adapted = {path: target for path, target in targets.items() if target.rule.kind != "none"}
    keys = mx.random.split(mx.random.key(seed), len(adapted)) if adapted else ()
    layers = {
        path: new_layer(target, key)
        for (path, target), key in zip(adapted.items(), keys, strict=True)
    }
    rules = {path: target.rule for path, target in targets.items()}
    return Fitted(config=config, rules=rules, layers=layers)


def _present_rule(rule: LoRARule, layer: AdapterLayer | None) -> LoRARule:
    if layer is None:
        return rule
    scale = rule.scale if np.float32(rule.scale) == layer.scale else layer.scale
    return replace(rule, rank=layer.rank, scale=scale)


def _shorten(lines: Iterable[str]) -> Iterator[str]:
    every = sorted(lines)
    yield from every[:_SHOWN]
    if len(every) > _SHOWN:
        yield f"... and {len(every) - _SHOWN} more like the last line"
