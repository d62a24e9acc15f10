"""Products with packed weights, and layers that multiply many rows faster.

A product unpacks its weight for the forward pass and again for the gradient. With automatic
differentiation, the unpacked weights of the whole model would stay in memory until the backward
pass, and packing would save nothing.

On a CPU, the time of mlx's kernels for packed weights grows with each row of inputs, which suits
decoding one token. For more rows it is faster to unpack the weight once and multiply floats. Both
give the same numbers up to rounding. `benchmarks/products.py` measures from how many rows. With
compiled functions, up to 64 rows are multiplied with weights of 4 and 8 bits as they are stored,
and weights of any number of bits are unpacked by all threads.

On a GPU, mlx's kernels multiply. Those of CUDA unpack a weight once for all rows of a matrix, but a
decode step gives each row as a matrix of its own, so the layers here make one matrix of them.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from math import prod
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float

from textpolicy.adapters.module_tree import replace_modules
from textpolicy.fast_cpu.gradients import with_gradient
from textpolicy.fast_cpu.packed_weights import (
    MOST_ROWS,
    PackedMatrix,
    multiplies_packed,
    packed_product,
    unpacked_weights,
)

# The number of float32 rows from which the product with weights that mlx unpacks is faster.
_MANY_ROWS = {"affine": 3, "mxfp8": 2, "mxfp4": 24, "nvfp4": 24}


def make_packed_product(
    unpack: Callable[..., mx.array], mode: str, bits: int
) -> Callable[..., mx.array]:
    """Return a function of x and of the arrays that `unpack` makes an outputs x inputs matrix of.

    The function multiplies in the dtype that `unpack` returns. Only x gets a gradient. Compiled
    functions multiply few rows without unpacking, and unpack, where there are such functions.
    """

    def weights(packed: Sequence[mx.array]) -> mx.array:
        unpacked = unpacked_weights(mode, bits, *packed)
        return unpack(*packed) if unpacked is None else unpacked

    def forward(x: mx.array, *packed: mx.array) -> mx.array:
        product = packed_product(mode, bits, x, *packed)
        if product is not None:
            return product
        weight = weights(packed)
        return (x.astype(weight.dtype) @ weight.T).astype(x.dtype)

    def backward(primals: Any, cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
        x, *packed = primals
        weight = weights(packed)
        gradient = (cotangent.astype(weight.dtype) @ weight).astype(x.dtype)
        return (gradient, *(mx.zeros_like(array) for array in packed))

    return with_gradient(forward, backward)


def unpack_quantized(
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None = None,
    *,
    group_size: int,
    bits: int,
    mode: str,
) -> mx.array:
    """Return the float32 weights that arrays of one of mlx's quantization modes stand for."""
    return mx.dequantize(
        weight,
        # With dtype=float32 alone, mlx would still round to the dtype of scales and biases.
        scales.astype(mx.float32) if mode == "affine" else scales,
        None if biases is None else biases.astype(mx.float32),
        group_size=group_size,
        bits=bits,
        mode=mode,
        dtype=mx.float32,
    )


class CPUQuantizedLinear(nn.QuantizedLinear):
    """A `QuantizedLinear` with another product. `use_fast_products` makes one."""

    def __call__(self, x: Float[mx.array, "*batch in"]) -> Float[mx.array, "*batch out"]:
        if not _is_faster(self, x):
            return super().__call__(x)
        y = _multiply(self, x)
        return y + self["bias"] if "bias" in self else y

    def packed_matrix(self) -> PackedMatrix | None:
        """Return the weight, if compiled functions multiply with it as it is stored."""
        return packed_matrix(self)


class CPUQuantizedEmbedding(nn.QuantizedEmbedding):
    """A `QuantizedEmbedding` with another product as an output head."""

    def as_linear(
        self, x: Float[mx.array, "*batch features"]
    ) -> Float[mx.array, "*batch vocabulary"]:
        """Return the logits that the table gives as an output head."""
        return _multiply(self, x) if _is_faster(self, x) else super().as_linear(x)


class CUDAQuantizedLinear(nn.QuantizedLinear):
    """A `QuantizedLinear` that multiplies all rows as one matrix."""

    def __call__(self, x: Float[mx.array, "*batch in"]) -> Float[mx.array, "*batch out"]:
        return _as_one_matrix(super().__call__, x)


class CUDAQuantizedEmbedding(nn.QuantizedEmbedding):
    """A `QuantizedEmbedding` that multiplies all rows as one matrix as an output head."""

    def as_linear(
        self, x: Float[mx.array, "*batch features"]
    ) -> Float[mx.array, "*batch vocabulary"]:
        """Return the logits that the table gives as an output head."""
        return _as_one_matrix(super().as_linear, x)


def _as_one_matrix(multiply: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
    batch = x.shape[:-1]
    y = multiply(x.reshape(prod(batch), x.shape[-1]))
    return y.reshape(*batch, y.shape[-1])


_CPU_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.QuantizedLinear: CPUQuantizedLinear,
    nn.QuantizedEmbedding: CPUQuantizedEmbedding,
}
_CUDA_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.QuantizedLinear: CUDAQuantizedLinear,
    nn.QuantizedEmbedding: CUDAQuantizedEmbedding,
}


def use_fast_products(model: nn.Module) -> None:
    """On a CPU and on CUDA, replace mlx's quantized layers by layers around the same arrays."""
    if mx.default_device().type == mx.cpu:
        classes = _CPU_CLASSES
    elif mx.cuda.is_available():
        classes = _CUDA_CLASSES
    else:
        return
    slow = {path: m for path, m in model.named_modules() if type(m) in classes}
    for path, module in slow.items():
        fast_class = classes[type(module)]
        made = fast_class.__new__(fast_class)
        vars(made).update(vars(module))
        # nn.Module.update takes parameters only.
        dict.update(made, module)
        replace_modules(model, {path: made})


def is_unpacked(mode: str, bits: int, group_size: int, inputs: int, rows: int) -> bool:
    """Return whether a product of float32 rows with a packed matrix unpacks it on a CPU."""
    if rows <= MOST_ROWS and multiplies_packed(mode, bits, group_size, inputs):
        return False
    return rows >= _MANY_ROWS.get(mode, 1)


def _is_faster(module: Any, x: mx.array) -> bool:
    """Return whether another product is faster than mlx's kernel for quantized weights."""
    # For inputs below float32, mlx's CPU kernels are slower for every number of rows.
    inputs, rows = x.shape[-1], x.size // x.shape[-1]
    if x.dtype != mx.float32 or rows >= _MANY_ROWS[module.mode]:
        return True
    is_float = module["scales"].dtype == mx.float32
    return is_float and multiplies_packed(module.mode, module.bits, module.group_size, inputs)


def _multiply(module: Any, x: mx.array) -> mx.array:
    product = _product_for(module.group_size, module.bits, module.mode)
    return product(x, *packed_arrays(module))


def packed_arrays(module: Any) -> list[mx.array]:
    """Return the codes and scales of a packed weight, and its biases if it has some."""
    arrays = [module["weight"], module["scales"]]
    biases = module.get("biases")
    return arrays if biases is None else [*arrays, biases]


def packed_matrix(module: Any) -> PackedMatrix | None:
    """Return a module's weight, if compiled functions multiply with it as it is stored."""
    codes, *groups = packed_arrays(module)
    inputs = codes.shape[-1] * codes.itemsize * 8 // module.bits
    return PackedMatrix.of(module.mode, module.bits, inputs, codes, *groups)


@cache
def _product_for(group_size: int, bits: int, mode: str) -> Callable[..., mx.array]:
    unpack = partial(unpack_quantized, group_size=group_size, bits=bits, mode=mode)
    return make_packed_product(unpack, mode, bits)
