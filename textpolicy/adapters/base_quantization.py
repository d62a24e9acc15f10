"""Quantizing a base model as rules or an adapter require."""

from collections.abc import Mapping

import mlx.nn as nn

from textpolicy.adapters.adapter import Adapter
from textpolicy.adapters.compatibility import check_fit
from textpolicy.adapters.config.adapter_config import (
    AdapterConfig,
    TargetModule,
    find_target_modules,
)
from textpolicy.adapters.quantization.number_formats import NumberFormat
from textpolicy.adapters.quantization.quantize import (
    model_quantization,
    quantization_problem,
    quantize,
    quantize_modules,
)
from textpolicy.adapters.quantization.stored_weights import format_of, weight_shape
from textpolicy.errors import ModelError


def quantize_by_rules(model: nn.Module, config: AdapterConfig) -> tuple[str, ...]:
    """Quantize in place what a config's rules name, and return the paths.

    If one module cannot be quantized, an error is raised and the model stays unchanged.
    """
    formats = formats_to_apply(find_target_modules(model, config))
    quantize_modules(model, formats)
    return tuple(formats)


def formats_to_apply(targets: Mapping[str, TargetModule]) -> dict[str, NumberFormat]:
    """Return the format for each module that rules quantize and that has another format now."""
    asked = {
        path: number_format
        for path, target in targets.items()
        if (number_format := target.rule.format_for(weight_shape(target.module)[-1]))
    }
    formats = {path: f for path, f in asked.items() if format_of(targets[path].module) != f}
    problems = [
        f"{path}: {reason}"
        for path, number_format in formats.items()
        if (reason := quantization_problem(targets[path].module, number_format))
    ]
    if problems:
        raise ModelError(
            "Rules name a weight_qtype for modules that cannot be quantized to it. Change "
            "tile_size, or put a rule without weight_qtype first\n  " + "\n  ".join(problems)
        )
    return formats


def needs_quantization(model: nn.Module, adapter: Adapter) -> bool:
    """Return whether `quantize_for_adapter` would quantize something."""
    if any(rule.number_format for rule in adapter.config.rules):
        return bool(formats_to_apply(find_target_modules(model, adapter.config)))
    return adapter.quantization is not None and not model_quantization(model)


def quantize_for_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Quantize a float model as the adapter's base was quantized: by its rules, or as a whole."""
    by_rules = any(rule.number_format for rule in adapter.config.rules)
    whole = None if by_rules or model_quantization(model) else adapter.quantization
    if by_rules or whole:
        # Quantization cannot be undone, so everything that can be checked is checked first.
        check_fit(model, adapter)
        quantize_by_rules(model, adapter.config)
    if whole:
        quantize(model, **whole)
