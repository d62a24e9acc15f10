"""Module trees: which names are frozen, replacing modules, and copying a tree around its arrays.

mlx keeps a module's frozen names in an attribute without a public reader; only this file uses it.
"""

from collections.abc import Mapping
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

_FROZEN = "_no_grad"


def named_arrays(parameters: Mapping[str, Any]) -> dict[str, mx.array]:
    """The arrays in nested parameters by their dotted names."""
    return cast(dict[str, mx.array], tree_flatten(parameters, destination={}))


def frozen_names(model: nn.Module) -> dict[str, set[str]]:
    """The names that each module, by its path, keeps out of training."""
    return {path: set(vars(module)[_FROZEN]) for path, module in model.named_modules()}


def freeze_names(model: nn.Module, names: Mapping[str, set[str]]) -> None:
    """Make `frozen_names(model)` equal `names`; paths that are not in `names` stay as they are."""
    for path, module in model.named_modules():
        if path in names:
            vars(module)[_FROZEN] = set(names[path])


def replace_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put each module in the place of the one at its path."""
    model.update_modules(tree_unflatten(list(modules.items())))


def share_tree(model: nn.Module) -> nn.Module:
    """Another tree of modules with the same arrays, not copies of them."""
    return _share(model, {})


def _share(value: Any, copies: dict[int, nn.Module]) -> Any:
    if isinstance(value, nn.Module):
        return copies[id(value)] if id(value) in copies else _share_module(value, copies)
    if isinstance(value, dict):
        return {name: _share(item, copies) for name, item in value.items()}
    if isinstance(value, list):
        return [_share(item, copies) for item in value]
    if isinstance(value, tuple):
        return tuple(_share(item, copies) for item in value)
    return value


def _share_module(module: nn.Module, copies: dict[int, nn.Module]) -> nn.Module:
    copy = type(module).__new__(type(module))
    # A module that occurs twice in the tree is one module in the copy too.
    copies[id(module)] = copy
    vars(copy).update(vars(module))
    vars(copy)[_FROZEN] = set(vars(module)[_FROZEN])
    for name, item in module.items():
        copy[name] = _share(item, copies)
    return copy
