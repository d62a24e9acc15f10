"""Rounding to q8_0, the 8-bit format of GGUF, in memory: for the proof, and for the survival."""

from importlib import import_module

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from textpolicy.activity import doing
from textpolicy.adapters.container import AdapterContainer
from textpolicy.adapters.fuse import FusedModule, FuseReport, measure_survival
from textpolicy.adapters.module_tree import replace_modules
from textpolicy.adapters.quantization.stored_weights import (
    float_weight,
    make_float_module,
    module_kind,
)
from textpolicy.export.gguf.gguf_package import import_gguf


@doing("rounding to q8_0")
def round_to_q8_0(model: nn.Module) -> None:
    """Give every matrix of a float model the values that a reader of q8_0 gets back, in place."""
    for path, module in dict(model.named_modules()).items():
        if module_kind(module):
            weight = _rounded(float_weight(module))
            made = make_float_module(module, weight, module.get("bias"))
            mx.eval(made.parameters())
            replace_modules(model, {path: made})


@doing("measuring what rounding leaves")
def survival_in_q8_0(adapters: AdapterContainer) -> FuseReport:
    """Return what is left of each update if the merged weights are rounded to q8_0."""
    modules: list[FusedModule] = []
    for path, layer in adapters.layers().items():
        base, delta = float_weight(layer.base), layer.delta()
        rounded = _rounded(base + delta)
        modules.append(measure_survival(path, "q8_0", base=base, delta=delta, rounded=rounded))
    return FuseReport(modules=tuple(modules))


def _rounded(weight: mx.array) -> mx.array:
    quants, q8_0 = import_module("gguf.quants"), import_gguf().GGMLQuantizationType.Q8_0
    return mx.array(quants.dequantize(quants.quantize(np.array(weight), q8_0), q8_0))
