"""Writing a GGUF file with the package `gguf`, which the extra `[gguf]` installs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from textpolicy.errors import ConfigError, ModelError
from textpolicy.file_writing import atomic_replace, make_writable_folder

Metadata = Mapping[str, int | float | bool | str | list[int] | list[str]]
NUMBER_FORMATS = ("f32", "f16", "bf16", "q8_0")
# The largest finite float16.
_LARGEST_F16 = 65504.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorToWrite:
    """A tensor that is computed when it is written, so that only one is in memory at a time."""

    shape: tuple[int, ...]
    number_format: str
    read: Callable[[], mx.array]


def tensor_in_memory(array: mx.array, number_format: str = "f32") -> TensorToWrite:
    """Return a tensor that is in memory already."""
    return TensorToWrite(shape=array.shape, number_format=number_format, read=lambda: array)


def import_gguf() -> Any:
    """Return the package `gguf`. Raise ConfigError if it is not installed."""
    try:
        return import_module("gguf")
    except ImportError as error:
        raise ConfigError(
            "writing GGUF files needs the package gguf: pip install 'textpolicy[gguf]'"
        ) from error


def write_gguf_file(
    path: Path, architecture: str, metadata: Metadata, tensors: Mapping[str, TensorToWrite]
) -> Path:
    """Replace the file at `path` in one step, and return its absolute path."""
    gguf = import_gguf()
    path = path.expanduser().absolute()
    make_writable_folder(path.parent, path)
    with atomic_replace(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        try:
            for key, value in metadata.items():
                _add_value(gguf, writer, key, value)
            _write_tensors(gguf, writer, tensors)
        finally:
            writer.close()
    return path


def _add_value(gguf: Any, writer: Any, key: str, value: object) -> None:
    types = gguf.GGUFValueType
    # llama.cpp reads each key as one type. A bool is an int too, so it comes first.
    kinds = {
        bool: types.BOOL,
        int: types.UINT32,
        float: types.FLOAT32,
        str: types.STRING,
        list: types.ARRAY,
    }
    writer.add_key_value(key, value, next(kinds[kind] for kind in kinds if isinstance(value, kind)))


def _write_tensors(gguf: Any, writer: Any, tensors: Mapping[str, TensorToWrite]) -> None:
    types = {name: gguf.GGMLQuantizationType[name.upper()] for name in NUMBER_FORMATS}
    for name, tensor in tensors.items():
        number_type = types[tensor.number_format]
        block, block_bytes = gguf.GGML_QUANT_SIZES[number_type]
        size = int(np.prod(tensor.shape)) // block * block_bytes
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), size, number_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors.items():
        values = np.array(tensor.read().astype(mx.float32))
        _check_range(name, values, tensor.number_format)
        writer.write_tensor_data(gguf.quantize(values, types[tensor.number_format]))


def _check_range(name: str, values: np.ndarray, number_format: str) -> None:
    """Raise ModelError for values that the number format cannot hold."""
    largest = float(np.abs(values).max())
    if not np.isfinite(largest):
        raise ModelError(f"{name} holds NaN or infinity. Use an earlier adapter or checkpoint")
    if number_format == "f16" and largest > _LARGEST_F16:
        raise ModelError(
            f"{name} holds {largest:.3g}, and f16 holds at most {_LARGEST_F16:g}. Choose the "
            "number format bf16 or f32"
        )
