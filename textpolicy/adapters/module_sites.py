"""The modules of a model that a config chooses."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import mlx.nn as nn

from textpolicy.adapters.config.adapter_config import AdapterConfig
from textpolicy.adapters.config.rules import LoRARule
from textpolicy.adapters.config.selection import Layout, Site, SiteKind
from textpolicy.adapters.quantization.nf4 import NF4Embedding, NF4Linear
from textpolicy.errors import AdapterError


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A module to adapt or to quantize, and the rule that says how."""

    module: nn.Module
    kind: SiteKind
    rule: LoRARule


def assign_rules(model: nn.Module, config: AdapterConfig) -> dict[str, Target]:
    """Every module that a rule applies to, one of kind "none" too, in the order of their paths."""
    modules = dict(model.named_modules())
    _check_unadapted(modules)
    layout = layout_of(model)
    rules = config.selection.assign(layout)
    targets = {
        path: Target(module=modules[path], kind=site.kind, rule=rules[path])
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


def select_targets(model: nn.Module, config: AdapterConfig) -> dict[str, Target]:
    """The modules to adapt by path, in the order of their paths."""
    targets = assign_rules(model, config)
    return {path: target for path, target in targets.items() if target.rule.kind != "none"}


def layout_of(model: nn.Module) -> Layout:
    """What can be adapted in a model, and where it is."""
    modules = dict(model.named_modules())
    blocks = _blocks(model)
    kinds = {path: kind for path, module in modules.items() if (kind := site_kind(module))}
    experts = [path for path, kind in kinds.items() if kind == "experts"]
    sites: dict[str, Site] = {}
    for path in sorted(kinds, key=_natural):
        block = _block_of(path, blocks or ())
        key = path if block is None else path.removeprefix(f"{(blocks or ())[block]}.")
        outside = blocks is not None and block is None
        sites[path] = Site(
            path=path,
            key=key,
            block=block,
            kind=cast(SiteKind, kinds[path]),
            by_name=outside or kinds[path] == "embedding" or _is_router(path, experts),
        )
    others = {path: type(module).__name__ for path, module in modules.items() if path not in kinds}
    return Layout(model=type(model).__name__, sites=sites, blocks=blocks, others=others)


def block_count(model: nn.Module) -> int:
    """How many blocks `num_layers` may choose from."""
    return layout_of(model).depth()


def site_kind(module: nn.Module) -> SiteKind | None:
    """How a module uses its weight, if it is one that can be adapted or quantized."""
    if isinstance(module, nn.Linear | nn.QuantizedLinear | NF4Linear):
        return "linear"
    if isinstance(module, nn.Embedding | nn.QuantizedEmbedding | NF4Embedding):
        return "embedding"
    return "experts" if isinstance(module, _expert_layers()) else None


def _expert_layers() -> tuple[type, ...]:
    # Importing mlx-lm takes seconds, and no model can hold its expert layers before it is imported.
    switch = sys.modules.get("mlx_lm.models.switch_layers")
    return (switch.SwitchLinear, switch.QuantizedSwitchLinear) if switch else ()


def _blocks(model: nn.Module) -> list[str] | None:
    """Paths of the model's blocks, first to last."""
    try:
        blocks = cast(list[nn.Module], model.layers)
    except AttributeError:
        return None
    paths = {id(module): path for path, module in model.named_modules()}
    return [paths[id(block)] for block in blocks]


def _block_of(path: str, blocks: list[str] | tuple[()]) -> int | None:
    found = (i for i, block in enumerate(blocks) if path.startswith(f"{block}."))
    return next(found, None)


def _is_router(path: str, experts: list[str]) -> bool:
    """Whether a module stands beside the stack of experts that it chooses from."""
    parent = path.rpartition(".")[0] + "."
    beside = [expert.removeprefix(parent) for expert in experts if expert.startswith(parent)]
    return path not in experts and any(expert.count(".") <= 1 for expert in beside)


def _check_unadapted(modules: Mapping[str, nn.Module]) -> None:
    adapted = [path for path, module in modules.items() if "lora_a" in module]
    if adapted:
        raise AdapterError(
            f"the model already has adapters ({min(adapted)} and {len(adapted) - 1} more). To "
            "replace them, call AdapterContainer.of(model).unload() first; to give them other "
            "weights, use its swap()"
        )


def _check_kinds(targets: Mapping[str, Target]) -> None:
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


def _natural(path: str) -> list[tuple[bool, int, str]]:
    """Block 10 comes after block 9."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.split(".")]
