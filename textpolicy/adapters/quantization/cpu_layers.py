"""mlx's quantized layers, with the faster of two exact products on CPUs.

mlx's kernels for packed weights take a time for each row of inputs there, which suits decoding one
token. For more rows it is quicker to make the weight float once and multiply plainly. Both give the
same numbers up to rounding; `benchmarks/products.py` measures where they cross.
"""

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float

from textpolicy.adapters.module_tree import replace_modules
from textpolicy.adapters.quantization.packed_product import Product, make_packed_product

# From so many rows on, the float product is the faster one.
_MANY_ROWS = {"affine": 3, "mxfp8": 2, "mxfp4": 24, "nvfp4": 24}


class CPUQuantizedLinear(nn.QuantizedLinear):
    """A `QuantizedLinear` in everything but how it multiplies. Made by `use_fast_products`."""

    def __call__(self, x: Float[mx.array, "*batch in"]) -> Float[mx.array, "*batch out"]:
        if not _many(x, self.mode):
            return super().__call__(x)
        y = _unpacked_product(self, x)
        return y + self["bias"] if "bias" in self else y


class CPUQuantizedEmbedding(nn.QuantizedEmbedding):
    """A `QuantizedEmbedding` in everything but how it multiplies as an output head."""

    def as_linear(
        self, x: Float[mx.array, "*batch features"]
    ) -> Float[mx.array, "*batch vocabulary"]:
        """The table as an output head."""
        return _unpacked_product(self, x) if _many(x, self.mode) else super().as_linear(x)


_FASTER: dict[type[nn.Module], type[nn.Module]] = {
    nn.QuantizedLinear: CPUQuantizedLinear,
    nn.QuantizedEmbedding: CPUQuantizedEmbedding,
}


def use_fast_products(model: nn.Module) -> None:
    """On a CPU, put these layers in the place of mlx's, around the same arrays."""
    if mx.default_device().type != mx.cpu:
        return
    slow = {path: m for path, m in model.named_modules() if type(m) in _FASTER}
    replace_modules(model, {path: _faster(module) for path, module in slow.items()})


def _faster(module: nn.Module) -> nn.Module:
    kind = _FASTER[type(module)]
    made = kind.__new__(kind)
    vars(made).update(vars(module))
    for name, item in module.items():
        made[name] = item
    return made


def _many(x: mx.array, mode: str) -> bool:
    rows = x.size // x.shape[-1]
    # Of inputs in fewer bits, mlx's CPU kernels are slower for every number of rows.
    return x.dtype != mx.float32 or rows >= _MANY_ROWS[mode]


def _unpacked_product(module: Any, x: mx.array) -> mx.array:
    arrays = (module["weight"], module["scales"], module.get("biases"))
    product = _product(module.group_size, module.bits, module.mode)
    return product(x, *(array for array in arrays if array is not None))


@cache
def _product(group_size: int, bits: int, mode: str) -> Product:
    def unpack(weight: mx.array, scales: mx.array, biases: mx.array | None = None) -> mx.array:
        floats = scales.astype(mx.float32) if mode == "affine" else scales
        return mx.dequantize(
            weight,
            floats,
            None if biases is None else biases.astype(mx.float32),
            group_size=group_size,
            bits=bits,
            mode=mode,
            dtype=mx.float32,
        )

    return make_packed_product(unpack)
