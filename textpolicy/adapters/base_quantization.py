"""Quantizing a base model as an adapter's config says."""

from collections.abc import Mapping

import mlx.nn as nn

from textpolicy.adapters.active_adapter import check_fit
from textpolicy.adapters.adapter import Adapter
from textpolicy.adapters.config.adapter_config import AdapterConfig
from textpolicy.adapters.config.target_modules import TargetModule, find_target_modules
from textpolicy.adapters.quantization.number_formats import NumberFormat
from textpolicy.adapters.quantization.quantize import (
    model_quantization,
    pack_modules,
    quantize,
    why_unpackable,
)
from textpolicy.adapters.quantization.stored_weights import format_of
from textpolicy.errors import ModelError


def quantize_by_rules(model: nn.Module, config: AdapterConfig) -> tuple[str, ...]:
    """Quantize in place what a config's rules say, or nothing if any of it cannot be."""
    forms = formats_to_apply(find_target_modules(model, config))
    pack_modules(model, forms)
    return tuple(forms)


def formats_to_apply(targets: Mapping[str, TargetModule]) -> dict[str, NumberFormat]:
    """What rules ask to quantize, by path; a base that already is as asked is left alone."""
    asked = {path: form for path, t in targets.items() if (form := t.rule.number_format)}
    forms = {path: form for path, form in asked.items() if format_of(targets[path].module) != form}
    problems = [
        f"{path}: {reason}"
        for path, form in forms.items()
        if (reason := why_unpackable(targets[path].module, form))
    ]
    if problems:
        raise ModelError(
            "rules ask for a quantization that cannot be; change tile_size, or put a rule without "
            "weight_qtype first\n  " + "\n  ".join(problems)
        )
    return forms


def quantize_for_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Quantize the model as the adapter's base was, by its rules or as a whole."""
    by_rules = any(rule.number_format for rule in adapter.config.rules)
    whole = None if by_rules or model_quantization(model) else adapter.quantization
    if by_rules or whole:
        # Quantizing cannot be undone, so what can be checked before is.
        check_fit(model, adapter)
        quantize_by_rules(model, adapter.config)
    if whole:
        quantize(model, **whole)
