"""Reading safetensors files with checks, and writing them with a checksum."""

import hashlib
import json
import math
import os
import secrets
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from textpolicy.adapters.adapter import bytes_of
from textpolicy.errors import AdapterError, UnreadableError, UnwritableError
from textpolicy.file_writing import atomic_replace
from textpolicy.machine import free_disk_bytes, size_text
from textpolicy.untrusted.bounds import MAX_HEADER_BYTES
from textpolicy.untrusted.files import open_regular
from textpolicy.untrusted.parsing import parse_json

METADATA_KEY = "__metadata__"
CHECKSUM_KEY = "file_sha256"
"""The metadata that holds the SHA-256 of the whole file, with 64 zeros in place of itself."""
TENSOR_SUFFIX = ".safetensors"
_LENGTH = struct.Struct("<Q")
_NO_CHECKSUM = b"0" * 64
_MAX_AXES = 8
_MAX_AXIS = 2**31 - 1
_DTYPES = {
    "BOOL": np.bool_,
    **{f"{kind}{8 * size}": f"<{kind.lower()}{size}" for kind in "IU" for size in (1, 2, 4, 8)},
    **{"F16": "<f2", "F32": "<f4", "F64": "<f8", "C64": "<c8"},
    # numpy has no bfloat16: the bits are read as whole numbers.
    "BF16": "<u2",
}
_NAMES = {
    **{mx.bool_: "BOOL", mx.float16: "F16", mx.bfloat16: "BF16", mx.float32: "F32"},
    **{mx.float64: "F64", mx.complex64: "C64", mx.int8: "I8", mx.int16: "I16", mx.int32: "I32"},
    **{mx.int64: "I64", mx.uint8: "U8", mx.uint16: "U16", mx.uint32: "U32", mx.uint64: "U64"},
}


def read_tensors(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Return the tensors and the metadata of a whole safetensors file, evaluated.

    Raise AdapterError if the file has a checksum and differs from what was written.
    """
    try:
        with open_regular(path) as file:
            # One opening reads all, because another process may replace the file at any moment.
            content = memoryview(file.read())
    except UnreadableError as error:
        raise AdapterError(str(error)) from error
    start, header = _parse_header(path, content[: _LENGTH.size], len(content), content)
    metadata = header.get(METADATA_KEY) or {}
    if (expected := metadata.get(CHECKSUM_KEY)) and expected != _checksum(content, start, expected):
        raise AdapterError(
            f"{path} is damaged: its content differs from what was written. Use an earlier file, "
            "or write the file again"
        )
    arrays = {
        name: _tensor(entry, content[start:])
        for name, entry in header.items()
        if name != METADATA_KEY
    }
    return arrays, metadata


def write_tensors(
    target: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, str]
) -> None:
    """Replace the safetensors file `target` in one step. The file holds its own checksum."""
    if not arrays:
        raise AdapterError(f"there are no tensors to write to {target}")
    needed = sum(array.nbytes for array in arrays.values())
    if (free := free_disk_bytes(target.parent)) < needed:
        raise UnwritableError(
            f"{target} cannot be written: it takes {size_text(needed)}, and the disk has "
            f"{size_text(free)} free. Free some space"
        )
    # Wide numbers come first, so that each tensor begins where its numbers may lie.
    ordered = dict(sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0])))
    contents = [bytes_of(array) for array in ordered.values()]
    place = secrets.token_hex(32).encode()
    header = _header_of(ordered, {**metadata, CHECKSUM_KEY: place.decode()})
    digest = hashlib.sha256(header.replace(place, _NO_CHECKSUM))
    for content in contents:
        digest.update(content)
    with atomic_replace(target) as temporary, temporary.open("wb") as file:
        file.write(header.replace(place, digest.hexdigest().encode()))
        file.writelines(contents)


def read_tensor_header(path: Path) -> tuple[dict[str, Any], os.stat_result]:
    """Return the header of a whole safetensors file, with the status of the opened file.

    The header is 8 bytes of length and that many bytes of JSON. The status comes from the same
    opening, because another process may replace the file at any moment.
    """
    try:
        with open_regular(path) as file:
            stat = os.fstat(file.fileno())
            prefix = file.read(_LENGTH.size)
            length = _header_length(path, prefix, stat.st_size)
            content = prefix + file.read(length)
    except UnreadableError as error:
        raise AdapterError(str(error)) from error
    return _parse_header(path, prefix, stat.st_size, content)[1], stat


def _parse_header(
    path: Path, prefix: bytes | memoryview, size: int, content: bytes | memoryview
) -> tuple[int, dict[str, Any]]:
    """Return where the tensors of a file of `size` bytes start, and its checked header."""
    start = _LENGTH.size + _header_length(path, prefix, size)
    try:
        header = parse_json(bytes(memoryview(content)[_LENGTH.size : start]))
        metadata = header.get(METADATA_KEY) or {}
        if not all(isinstance(text, str) for text in metadata.values()):
            raise TypeError("its metadata is not text")
        spans = [_span(entry) for name, entry in header.items() if name != METADATA_KEY]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _not_whole(path, "it has no safetensors header") from error
    end = max((end for _, end in spans), default=0)
    if size != start + end:
        raise _not_whole(path, f"it has {size} bytes, but its header says {start + end}")
    ends = [0, *(end for _, end in sorted(spans))]
    if any(begin != before for (begin, _), before in zip(sorted(spans), ends, strict=False)):
        raise _not_whole(path, "its tensors overlap or leave gaps")
    return start, header


def _header_length(path: Path, prefix: bytes | memoryview, size: int) -> int:
    length = _LENGTH.unpack(prefix)[0] if len(bytes(prefix)) == _LENGTH.size else size
    if length > min(size - _LENGTH.size, MAX_HEADER_BYTES):
        raise _not_whole(path, "it has no safetensors header")
    return length


def _span(entry: Mapping[str, Any]) -> tuple[int, int]:
    """Return the first byte of a tensor and the byte after it; raise ValueError for a wrong one."""
    begin, end = entry["data_offsets"]
    shape = entry["shape"]
    whole = all(type(number) is int and number >= 0 for number in (begin, end, *shape))
    if not whole or len(shape) > _MAX_AXES or max(shape, default=0) > _MAX_AXIS:
        raise ValueError("a tensor has a wrong shape")
    if end - begin != math.prod(shape) * np.dtype(_DTYPES[entry["dtype"]]).itemsize:
        raise ValueError("a tensor's bytes are not those of its shape")
    return begin, end


def _tensor(entry: Mapping[str, Any], payload: memoryview) -> mx.array:
    begin, end = entry["data_offsets"]
    values = np.frombuffer(payload[begin:end], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
    array = mx.array(values)
    return array.view(mx.bfloat16) if entry["dtype"] == "BF16" else array


def _checksum(content: memoryview, start: int, own: str) -> str:
    digest = hashlib.sha256(bytes(content[:start]).replace(own.encode(), _NO_CHECKSUM))
    digest.update(content[start:])
    return digest.hexdigest()


def _header_of(arrays: Mapping[str, mx.array], metadata: Mapping[str, str]) -> bytes:
    """Return the first bytes of a safetensors file, whose tensors follow in this order."""
    header: dict[str, Any] = {METADATA_KEY: metadata}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        dtype, offsets = _NAMES[array.dtype], [begin, end]
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH.size)
    return _LENGTH.pack(len(text)) + text


def _not_whole(path: Path, reason: str) -> AdapterError:
    return AdapterError(
        f"{path} is not a whole safetensors file: {reason}. The writer may have been interrupted. "
        "Write the file again, or use an earlier file"
    )
