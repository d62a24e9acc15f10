"""The modules of a model that a config chooses."""

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.nn as nn

from textpolicy.adapters.config.adapter_config import AdapterConfig
from textpolicy.adapters.config.model_layout import read_model_layout
from textpolicy.adapters.config.rules import LoRARule
from textpolicy.adapters.quantization.stored_weights import ModuleKind
from textpolicy.errors import AdapterError


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetModule:
    """A module to adapt or to quantize, and the rule that says how."""

    module: nn.Module
    kind: ModuleKind
    rule: LoRARule


def find_target_modules(model: nn.Module, config: AdapterConfig) -> dict[str, TargetModule]:
    """Every module that a rule applies to, one of kind "none" too, in the order of their paths."""
    modules = dict(model.named_modules())
    _check_unadapted(modules)
    layout = read_model_layout(model)
    rules = config.selection.assign(layout)
    targets = {
        path: TargetModule(module=modules[path], kind=site.kind, rule=rules[path])
        for path, site in layout.sites.items()
        if path in rules
    }
    if not targets:
        raise AdapterError(
            f"nothing to adapt in {layout.model}: the config chooses none of its "
            f"{len(layout.sites)} linear, embedding and expert layers"
        )
    _check_kinds(targets)
    return targets


def find_modules_to_adapt(model: nn.Module, config: AdapterConfig) -> dict[str, TargetModule]:
    """The modules to adapt by path, in the order of their paths."""
    targets = find_target_modules(model, config)
    return {path: target for path, target in targets.items() if target.rule.kind != "none"}


def _check_unadapted(modules: Mapping[str, nn.Module]) -> None:
    adapted = [path for path, module in modules.items() if "lora_a" in module]
    if adapted:
        raise AdapterError(
            f"the model already has adapters ({min(adapted)} and {len(adapted) - 1} more). To "
            "replace them, call AdapterContainer.of(model).unload() first; to give them other "
            "weights, use its swap()"
        )


def _check_kinds(targets: Mapping[str, TargetModule]) -> None:
    experts = [
        path
        for path, target in targets.items()
        if target.kind == "experts" and target.rule.kind == "dora"
    ]
    if experts:
        raise AdapterError(
            f"DoRA on {experts[0]} and {len(experts) - 1} more: expert layers take LoRA only, "
            "because DoRA would measure the weights of every expert for every batch. Name the "
            "other layers, or put a rule of kind 'lora' for the experts first"
        )
