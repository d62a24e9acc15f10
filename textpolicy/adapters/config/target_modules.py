"""The modules of a model that a config selects."""

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
    """A module that a config selects, and the rule that applies to it."""

    module: nn.Module
    kind: ModuleKind
    rule: LoRARule


def find_target_modules(model: nn.Module, config: AdapterConfig) -> dict[str, TargetModule]:
    """Return the modules that a config selects by path, first block first.

    Modules whose rule has kind "none" are included. Raise AdapterError if a rule or a name in the
    config matches nothing.
    """
    modules = dict(model.named_modules())
    _refuse_adapted_model(modules)
    layout = read_model_layout(model)
    rules = config.selection.assign_rules(layout)
    targets = {
        path: TargetModule(module=modules[path], kind=one.kind, rule=rules[path])
        for path, one in layout.adaptable.items()
        if path in rules
    }
    if not targets:
        raise AdapterError(
            f"There is nothing to adapt in {layout.model}: the config selects none of its "
            f"{len(layout.adaptable)} linear, embedding and expert layers"
        )
    _refuse_dora_experts(targets)
    return targets


def _refuse_adapted_model(modules: Mapping[str, nn.Module]) -> None:
    adapted = [path for path, module in modules.items() if "lora_a" in module]
    if adapted:
        raise AdapterError(
            f"The model already has adapters ({min(adapted)} and {len(adapted) - 1} more). To "
            "replace them, call AdapterContainer.of(model).unload() first. To give them other "
            "weights, call swap() on the container"
        )


def _refuse_dora_experts(targets: Mapping[str, TargetModule]) -> None:
    experts = [
        path
        for path, target in targets.items()
        if target.kind == "experts" and target.rule.kind == "dora"
    ]
    if experts:
        raise AdapterError(
            f"A rule asks for DoRA on {experts[0]} and {len(experts) - 1} more, but expert layers "
            "take LoRA only: DoRA would measure the weights of every expert for every batch. Name "
            "the other layers, or put a rule of kind 'lora' for the experts first"
        )
