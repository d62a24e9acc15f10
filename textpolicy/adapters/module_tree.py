"""Functions on a model's tree of modules: frozen names, replacing modules, copying the tree.

mlx keeps a module's frozen names in a private attribute. Only this file uses the attribute.
"""

from collections.abc import Mapping
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

_FROZEN = "_no_grad"


def named_arrays(parameters: Mapping[str, Any]) -> dict[str, mx.array]:
    """Return the arrays of nested parameters by their dotted names."""
    return cast(dict[str, mx.array], tree_flatten(parameters, destination={}))


def frozen_names(model: nn.Module) -> dict[str, set[str]]:
    """Return the names of the frozen parameters of each module, by the module's path."""
    return {path: set(vars(module)[_FROZEN]) for path, module in model.named_modules()}


def freeze_names(model: nn.Module, names: Mapping[str, set[str]]) -> None:
    """Make `frozen_names(model)` equal `names`. Modules that are not in `names` stay unchanged."""
    for path, module in model.named_modules():
        if path in names:
            vars(module)[_FROZEN] = set(names[path])


def replace_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Replace the module at each path."""
    model.update_modules(tree_unflatten(list(modules.items())))


def share_module_tree(model: nn.Module) -> nn.Module:
    """Return a copy of the tree of modules that shares the arrays."""
    return _share_value(model, {})


def _share_value(value: Any, copies: dict[int, nn.Module]) -> Any:
    if isinstance(value, nn.Module):
        return copies[id(value)] if id(value) in copies else _share_module(value, copies)
    if isinstance(value, dict):
        return {name: _share_value(item, copies) for name, item in value.items()}
    if isinstance(value, list):
        return [_share_value(item, copies) for item in value]
    if isinstance(value, tuple):
        return tuple(_share_value(item, copies) for item in value)
    return value


def _share_module(module: nn.Module, copies: dict[int, nn.Module]) -> nn.Module:
    copy = type(module).__new__(type(module))
    # A module that occurs twice in the tree is one module in the copy as well.
    copies[id(module)] = copy
    vars(copy).update(vars(module))
    vars(copy)[_FROZEN] = set(vars(module)[_FROZEN])
    for name, item in module.items():
        copy[name] = _share_value(item, copies)
    return copy
