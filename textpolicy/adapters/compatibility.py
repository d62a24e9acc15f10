"""Checks that an adapter fits a model. One error lists every reason why it does not."""

from collections.abc import Iterable, Iterator, Mapping

import mlx.core as mx
import mlx.nn as nn

from textpolicy.adapters.adapter import Adapter, group_by_module, is_finite
from textpolicy.adapters.base_identity import BaseIdentity
from textpolicy.adapters.config.adapter_config import TargetModule, find_target_modules
from textpolicy.adapters.config.model_layout import read_model_layout
from textpolicy.adapters.config.rules import LoRARule
from textpolicy.adapters.layers.adapter_layer import tensor_shapes
from textpolicy.adapters.quantization.stored_weights import module_kind, weight_shape
from textpolicy.errors import AdapterError

_MAX_LINES = 8


def check_fit(
    model: nn.Module, adapter: Adapter, base: BaseIdentity | None = None
) -> dict[str, TargetModule]:
    """Return the modules that an adapter is for in a model without adapters.

    Raise one AdapterError with every difference in the base, the modules and the tensors.
    """
    targets, problems = find_adapter_targets(model, adapter, base)
    modules = {path: target.module for path, target in targets.items()}
    shapes = expected_shapes(modules, {path: target.rule for path, target in targets.items()})
    raise_if_problems(adapter.origin, problems, tensor_problems(shapes, adapter.arrays))
    return targets


def find_adapter_targets(
    model: nn.Module, adapter: Adapter, base: BaseIdentity | None
) -> tuple[dict[str, TargetModule], list[str]]:
    """Return the modules that an adapter's config selects, and the problems with the base.

    If the config does not fit the model, raise AdapterError; its message lists the problems with
    the base too.
    """
    problems = base.differences(adapter) if base else []
    if adapter.rows_in_pairs:
        problems.append("its rows are in llama.cpp's order: load it with AdapterContainer")
    if adapter.embedding_lookup_only and not (layout := read_model_layout(model)).has_head:
        problems += [
            f"{path}: adapted for looking tokens up only, but it is the model's output head too. "
            "Train with PEFT's ensure_weight_tying=True, or leave embeddings out"
            for path in group_by_module(adapter.arrays)
            if path in layout.adaptable and layout.adaptable[path].kind == "embedding"
        ]
    try:
        return find_target_modules(model, adapter.config), problems
    except AdapterError as error:
        raise_if_problems(adapter.origin, problems, [str(error)])
        raise


def expected_shapes(
    modules: Mapping[str, nn.Module], rules: Mapping[str, LoRARule]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all adapter tensors that these modules have under these rules."""
    return {
        f"{path}.{name}": shape
        for path, module in modules.items()
        if path in rules and rules[path].kind != "none" and (kind := module_kind(module))
        for name, shape in tensor_shapes(rules[path], kind, weight_shape(module)).items()
    }


def tensor_problems(
    expected: Mapping[str, tuple[int, ...]], given: Mapping[str, mx.array]
) -> list[str]:
    """Return a line for each tensor that does not fit the model or is not finite."""
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


def raise_if_problems(origin: str, *problems: Iterable[str]) -> None:
    """Raise one AdapterError with all problems, or return if there are none."""
    if lines := [line for some in problems for line in some]:
        text = "\n  ".join([f"{origin} does not fit the adapters of this model:", *lines])
        raise AdapterError(f"{text}\nWas it made with other options, or for another model?")


def _shorten(lines: Iterable[str]) -> Iterator[str]:
    every = sorted(lines)
    yield from every[:_MAX_LINES]
    if len(every) > _MAX_LINES:
        yield f"... and {len(every) - _MAX_LINES} more like the last line"
