"""Copies of a model's weights in bfloat16, by which few rows are multiplied on a CPU.

The time of a decode step is mostly that of reading the weights. On a CPU, weights are float32,
because training needs fast products of many rows. But in most checkpoints the weights are bfloat16
numbers. `bfloat16_copies.c` reads these numbers from half as many bytes, and loses nothing.
"""

import ctypes
import os
import weakref
from threading import Lock
from weakref import WeakValueDictionary

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from textpolicy.fast_cpu.blas import enable
from textpolicy.fast_cpu.few_rows import compiled_loops

FEWEST_NUMBERS = 2**22
"""A model with fewer weights has no copies: the processor's caches hold all of them anyway."""


class _Copy:
    """A copy of a matrix, which exists as long as this object does."""

    def __init__(self, weight: mx.array, address: int) -> None:
        outputs, inputs = weight.shape
        self.bytes = _add(address, outputs, inputs)
        # The finalizer keeps the array, so that nothing else gets its memory before the copy is
        # dropped. It is an array of its own: writing to the model's array does not change it.
        own = weight.reshape(weight.shape)
        weakref.finalize(self, _drop, address, os.getpid(), own).atexit = False


_LOCK = Lock()
# By the address of the matrix: models may share their arrays.
_COPIES: WeakValueDictionary[int, _Copy] = WeakValueDictionary()
_COPIES_OF_MODELS: dict[int, list[_Copy]] = {}


def keep_copies(model: nn.Module, most_bytes: int) -> int:
    """Keep bfloat16 copies of a model's weights for as long as the model exists; return their size.

    A matrix with other numbers than those of bfloat16 has no copy. There are no copies either where
    no compiled loops multiply few rows, where all copies would take more than `most_bytes`, or of a
    small model. A second call for a model whose weights are the same copies nothing.
    """
    weights = _multiplied(model) if mx.default_device().type == mx.cpu else {}
    numbers = sum(weight.size for weight in weights.values())
    fits = FEWEST_NUMBERS <= numbers <= most_bytes // mx.bfloat16.size
    if not weights or not fits or not enable().few_rows:
        # Copies of weights that the model had before are dropped.
        _COPIES_OF_MODELS.pop(id(model), None)
        return 0
    with _LOCK:
        if id(model) not in _COPIES_OF_MODELS:
            weakref.finalize(model, _COPIES_OF_MODELS.pop, id(model), None).atexit = False
        copies = [_copy_of(weight, address) for address, weight in weights.items()]
        # A matrix without a copy is not held: a model that drops the matrix frees its memory.
        copies = [copy for copy in copies if copy.bytes]
        _COPIES_OF_MODELS[id(model)] = copies
    return sum(copy.bytes for copy in copies)


def copied_bytes() -> int:
    """Return the memory of all copies, which mlx does not count."""
    # Another thread may make copies meanwhile.
    return sum(copy.bytes for reference in _COPIES.valuerefs() if (copy := reference()))


def _multiplied(model: nn.Module) -> dict[int, mx.array]:
    """Return the float32 matrices by which a model multiplies, by their addresses."""
    found: dict[int, mx.array] = {}
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    heads = {layer["weight"].shape[0] for layer in layers}
    for module in model.modules():
        # Without a linear layer that has an output for each token, the embedding is the head.
        is_head = isinstance(module, nn.Embedding) and module["weight"].shape[0] not in heads
        weight = module["weight"] if is_head or isinstance(module, nn.Linear) else None
        if weight is not None and weight.dtype == mx.float32:
            view = np.array(weight, copy=False)
            if view.flags.c_contiguous:
                found[view.ctypes.data] = weight
    return found


def _copy_of(weight: mx.array, address: int) -> _Copy:
    copy = _COPIES.get(address)
    if copy is None:
        copy = _COPIES[address] = _Copy(weight, address)
    return copy


def _add(address: int, outputs: int, inputs: int) -> int:
    add = compiled_loops().bfloat16_copies_add
    add.restype = ctypes.c_long
    return add(ctypes.c_void_p(address), outputs, inputs, enable().threads or 1)


def _drop(address: int, maker: int, _: mx.array) -> None:
    # In a forked process, a thread that is not there may hold the lock of the copies.
    if os.getpid() == maker:
        compiled_loops().bfloat16_copies_drop(ctypes.c_void_p(address))
