"""Which modules of a model a config means, and clear words where it means none."""

import sys
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from typing import cast

import mlx.nn as nn

from textpolicy.adapters.config import AdapterConfig
from textpolicy.adapters.layers import ADAPTED_BY
from textpolicy.errors import AdapterError


def select_targets(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """The modules to adapt by path, in the order of their paths."""
    blocks = _last_blocks(model, config.num_layers)
    modules = dict(model.named_modules())
    _check_unadapted(modules)
    if config.keys is not None:
        return _by_keys(modules, blocks, config.keys)
    inside = {
        path: module
        for path, module in modules.items()
        if any(path.startswith(f"{block}.") for block in blocks)
    }
    experts = [path for path, module in inside.items() if isinstance(module, _expert_layers())]
    if experts:
        raise AdapterError(
            f"{min(experts)} and {len(experts) - 1} more are expert layers, which cannot be "
            "adapted yet. Name the linear layers to adapt, for example "
            "keys=['self_attn.q_proj', 'self_attn.v_proj']"
        )
    found = {path: m for path, m in inside.items() if isinstance(m, tuple(ADAPTED_BY))}
    if not found:
        raise AdapterError(f"no linear layers to adapt in the blocks of {type(model).__name__}")
    return _sorted(found)


def block_count(model: nn.Module) -> int:
    """How many blocks `num_layers` may choose from."""
    return len(_blocks(model))


def _last_blocks(model: nn.Module, num_layers: int) -> list[str]:
    blocks = _blocks(model)
    if num_layers > len(blocks):
        raise AdapterError(
            f"num_layers is {num_layers}, the model has {len(blocks)} blocks; "
            f"expected 1 to {len(blocks)}, or -1 for all"
        )
    return blocks if num_layers == -1 else blocks[-num_layers:]


def _blocks(model: nn.Module) -> list[str]:
    """Paths of the model's blocks, first to last."""
    try:
        blocks = cast(list[nn.Module], model.layers)
    except AttributeError as error:
        raise AdapterError(
            f"{type(model).__name__} has no .layers to count blocks by; expected a language model "
            "as mlx-lm makes them"
        ) from error
    paths = {id(module): path for path, module in model.named_modules()}
    return [paths[id(block)] for block in blocks]


def _check_unadapted(modules: dict[str, nn.Module]) -> None:
    adapted = [path for path, module in modules.items() if "lora_a" in module]
    if adapted:
        raise AdapterError(
            f"the model already has adapters ({min(adapted)} and {len(adapted) - 1} more). To "
            "replace them, call AdapterContainer.of(model).unload() first; to give them other "
            "weights, use its swap()"
        )


def _by_keys(
    modules: dict[str, nn.Module], blocks: list[str], keys: Collection[str]
) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    problems: list[str] = []
    for key in keys:
        paths = [path for path in (*(f"{block}.{key}" for block in blocks), key) if path in modules]
        if not paths:
            problems.append(f"{key!r} matches nothing; nearest: {_nearest(key, modules, blocks)}")
        for path in paths:
            if isinstance(modules[path], tuple(ADAPTED_BY)):
                found[path] = modules[path]
            else:
                problems.append(f"{path!r} is {type(modules[path]).__name__}")
    if problems:
        kinds = [kind.__name__ for kind in ADAPTED_BY]
        raise AdapterError(
            "keys do not fit the model; expected paths of "
            f"{' or '.join(kinds)}, such as 'self_attn.q_proj'\n  " + "\n  ".join(problems)
        )
    return _sorted(found)


def _nearest(key: str, modules: dict[str, nn.Module], blocks: list[str]) -> list[str]:
    """Paths that end in `key`, or else paths that are spelled like it."""
    paths = [path for path, module in modules.items() if isinstance(module, tuple(ADAPTED_BY))]
    short = sorted({_inside_block(path, blocks) for path in paths})
    endings = [path for path in short if path.endswith(f".{key}")]
    return endings or get_close_matches(key, short + paths, n=3, cutoff=0.0)


def _inside_block(path: str, blocks: Iterable[str]) -> str:
    prefix = next((f"{block}." for block in blocks if path.startswith(f"{block}.")), "")
    return path.removeprefix(prefix)


def _expert_layers() -> tuple[type, ...]:
    # Importing mlx-lm takes seconds, and no model can hold its expert layers before it is imported.
    switch = sys.modules.get("mlx_lm.models.switch_layers")
    return (switch.SwitchLinear, switch.QuantizedSwitchLinear) if switch else ()


def _sorted(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    return dict(sorted(modules.items()))
