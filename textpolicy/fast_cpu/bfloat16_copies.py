"""Copies of a model's weights in bfloat16, by which few rows are multiplied on a CPU.

The time of a decode step is mostly that of reading the weights. On a CPU, weights are float32,
because training needs fast products of many rows. But in most checkpoints the weights are bfloat16
numbers. `bfloat16_copies.c` reads these numbers from half as many bytes, and loses nothing.
"""

import ctypes
import weakref
from collections.abc import Iterator
from threading import Lock
from weakref import WeakValueDictionary

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from textpolicy.fast_cpu.blas import enable
from textpolicy.fast_cpu.few_rows import compiled_loops


class _Copy:
    """A copy of a matrix, which exists as long as this object does."""

    def __init__(self, weight: mx.array, address: int) -> None:
        outputs, inputs = weight.shape
        self.bytes = _add(address, outputs, inputs)
        if self.bytes:
            # The finalizer keeps the array, so that nothing else gets its memory before the copy is
            # dropped. It is an array of its own: writing to the model's array does not change it.
            weakref.finalize(self, _drop, address, weight.reshape(weight.shape))


_LOCK = Lock()
# By the address of the matrix: models may share their arrays.
_COPIES: WeakValueDictionary[int, _Copy] = WeakValueDictionary()
_COPIES_OF_MODELS: dict[int, list[_Copy]] = {}


def keep_copies(model: nn.Module, most_bytes: int) -> int:
    """Keep bfloat16 copies of a model's weights for as long as the model exists; return their size.

    A matrix with other numbers than those of bfloat16 has no copy. There are no copies either where
    no compiled loops multiply few rows, or where all copies would take more than `most_bytes`. A
    second call for a model whose weights are the same takes no time.
    """
    weights = [*_multiplied(model)] if mx.default_device().type == mx.cpu else []
    if not weights or sum(w.size for w in weights) * mx.bfloat16.size > most_bytes:
        return 0
    if not enable().few_rows:
        return 0
    with _LOCK:
        if id(model) not in _COPIES_OF_MODELS:
            weakref.finalize(model, _COPIES_OF_MODELS.pop, id(model), None)
        copies = _COPIES_OF_MODELS[id(model)] = [_copy_of(weight) for weight in weights]
    return sum(copy.bytes for copy in copies)


def copied_bytes() -> int:
    """Return the memory of all copies, which mlx does not count."""
    return sum(copy.bytes for copy in [*_COPIES.values()])


def _multiplied(model: nn.Module) -> Iterator[mx.array]:
    """Yield the float32 matrices by which a model multiplies, once each."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    heads = {layer["weight"].shape[0] for layer in layers}
    for module in model.modules():
        # Without a linear layer that has an output for each token, the embedding is the head.
        is_head = isinstance(module, nn.Embedding) and module["weight"].shape[0] not in heads
        if (is_head or isinstance(module, nn.Linear)) and module["weight"].dtype == mx.float32:
            yield module["weight"]


def _copy_of(weight: mx.array) -> _Copy:
    address: int = np.array(weight, copy=False).ctypes.data
    copy = _COPIES.get(address)
    if copy is None:
        copy = _COPIES[address] = _Copy(weight, address)
    return copy


def _add(address: int, outputs: int, inputs: int) -> int:
    add = compiled_loops().bfloat16_copies_add
    add.restype = ctypes.c_long
    return add(ctypes.c_void_p(address), outputs, inputs, enable().threads or 1)


def _drop(address: int, _: mx.array) -> None:
    compiled_loops().bfloat16_copies_drop(ctypes.c_void_p(address))
