"""MergedCopy: a copy of a model whose weights include the adapters, to generate without layers."""

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn

from textpolicy.adapters.adapter_state import AdapterState
from textpolicy.adapters.layers.adapter_layer import AdapterLayer, adapter_layers
from textpolicy.adapters.module_tree import named_arrays, replace_modules, share_module_tree
from textpolicy.adapters.quantization.stored_weights import format_of
from textpolicy.errors import ConfigError

_FLOAT32 = "float32"


class MergedCopy:
    """A copy of an adapted model in which plain modules with merged weights replace its layers.

    The copy shares all other arrays with the model, and never changes the model or its adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        """Raise `ConfigError` if an adapted weight is not float32. Nothing is merged yet."""
        _check_layers(adapter_layers(model))
        self._source = model
        self._copy = share_module_tree(model)
        self._state: AdapterState | None = None
        self._sampled = model

    def refresh(self) -> nn.Module:
        """Return the copy, with new merged weights if the model has other adapters than before.

        An array of the adapters that was changed in place, and not replaced, counts as the same.
        The copy is the same object in every call, so an engine that decodes with the copy takes
        the new weights from its next step on. A model without adapters is returned itself.
        """
        state = AdapterState.of(self._source)
        if state != self._state:
            # An interruption leaves weights of two versions, which the next call must replace.
            self._state = None
            layers = adapter_layers(self._source)
            self._merge(layers)
            self._sampled = self._copy if layers else self._source
            self._state = self._copy.merged_state = state
        return self._sampled

    def _merge(self, layers: Mapping[str, AdapterLayer]) -> None:
        _check_layers(layers)
        # The modules of the model, as they are now, replace the merged ones, whose memory is free
        # before new weights take it: one set of merged weights is the most that there is.
        self._copy.update_modules(share_module_tree(self._source).children())
        for path, layer in layers.items():
            replace_modules(self._copy, {path: _merged_module(layer)})


def weight_format(module: nn.Module) -> str:
    """Return the name of the number format or of the dtype in which a module has its weight."""
    number_format = format_of(module)
    dtype: mx.Dtype = module["weight"].dtype
    return number_format.name if number_format else str(dtype).removeprefix("mlx.core.")


def check_mergeable(formats: Mapping[str, str]) -> None:
    """Raise `ConfigError` if a weight that is to be adapted is not float32.

    `formats` has the `weight_format` of each adapted module by path.
    """
    others = {path: name for path, name in formats.items() if name != _FLOAT32}
    if others:
        path, name = next(iter(others.items()))
        raise ConfigError(
            f"merge_adapters is on, and {len(others)} of {len(formats)} adapted weights are not "
            f"float32: the weight of {path} is {name}. Adapters are merged into float32 weights "
            "only, because a format of fewer bits rounds small updates away, and the policy would "
            "not sample what the trainer trains. Load the model in float32 and without "
            "quantization (--dtype float32, without --quantize), or leave merge_adapters out"
        )


def _check_layers(layers: Mapping[str, AdapterLayer]) -> None:
    check_mergeable({path: weight_format(layer.base) for path, layer in layers.items()})


def _merged_module(layer: AdapterLayer) -> nn.Module:
    """Return an evaluated plain module that computes what the layer does, up to rounding."""
    if not layer.enabled:
        return layer.base
    merged = layer.fused().freeze()
    arrays, base = named_arrays(merged.parameters()), named_arrays(layer.base.parameters())
    mx.eval(arrays)
    # The base's module computes the same until the first update, and takes no memory.
    unchanged = arrays.keys() == base.keys() and all(
        mx.array_equal(array, base[name]).item() for name, array in arrays.items()
    )
    return layer.base if unchanged else merged
