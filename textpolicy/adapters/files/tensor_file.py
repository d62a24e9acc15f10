"""Reading and writing safetensors files, and replacing any file in one step.

A file is written under a temporary name in the same folder, flushed and renamed. A reader sees
the old file or the new file, never a part of one.
"""

import json
import os
import re
import secrets
import struct
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from textpolicy.errors import AdapterError, UnwritableError

METADATA_KEY = "__metadata__"
TENSOR_SUFFIX = ".safetensors"
_LENGTH = struct.Struct("<Q")
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{12}\.\w+")


def read_tensors(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Return the tensors and the metadata of a whole safetensors file, evaluated."""
    read_tensor_header(path)
    try:
        # One call reads both, because another process may replace the file at any moment.
        arrays, metadata = cast(Any, mx.load(str(path), return_metadata=True))
        mx.eval(arrays)
    except RuntimeError as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    return arrays, metadata


def write_tensors(
    target: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, str]
) -> None:
    """Replace the safetensors file `target` in one step."""
    if not arrays:
        raise AdapterError(f"there are no tensors to write to {target}")
    with atomic_replace(target) as temporary:
        mx.save_safetensors(str(temporary), dict(arrays), dict(metadata))


def read_tensor_header(path: Path) -> tuple[dict[str, Any], os.stat_result]:
    """Return the header of a whole safetensors file, with the status of the opened file.

    The header is 8 bytes of length and that many bytes of JSON. The status comes from the same
    opening, because another process may replace the file at any moment.
    """
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            size = stat.st_size
            prefix = file.read(_LENGTH.size)
            length = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else size
            text = file.read(length) if length < size else b""
    except IsADirectoryError as error:
        raise AdapterError(
            f"{path} is a folder; expected one file with a name ending in {TENSOR_SUFFIX}"
        ) from error
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror}") from error
    try:
        header = json.loads(text)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != METADATA_KEY]
        expected = _LENGTH.size + length + max(ends, default=0)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _not_whole(path, "it has no safetensors header") from error
    if size != expected:
        raise _not_whole(path, f"it has {size} bytes, but its header says {expected}")
    return header, stat


def make_writable_folder(folder: Path, target: Path) -> None:
    """Make the folder that will hold `target`. Raise UnwritableError if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(target, error) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _unwritable(target, "this process has no permission to write in the folder")


@contextmanager
def atomic_replace(target: Path) -> Generator[Path]:
    """Yield a temporary path to write, and rename it to `target` after the block."""
    # mx.save_safetensors appends ".safetensors" to a name with another suffix.
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(6)}{target.suffix}")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, target)
        _flush(target.parent)
    except OSError as error:
        raise _unwritable(target, error) from error
    except RuntimeError as error:
        raise _unwritable(target, _why_disk_refuses(temporary) or error) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_partial_files(folder: Path) -> None:
    """Remove temporary files that a killed process left in the folder.

    Only the single process that writes in this folder may call this, between two files.
    """
    for path in folder.glob(".*"):
        if _PARTIAL.fullmatch(path.name):
            path.unlink()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _why_disk_refuses(path: Path) -> str | None:
    """Return the system's reason for taking no more bytes, which mlx does not report, or None."""
    try:
        with path.open("ab") as file:
            file.write(bytes(1 << 16))
    except OSError as error:
        return error.strerror
    return None


def _unwritable(target: Path, reason: object) -> UnwritableError:
    return UnwritableError(
        f"{target} cannot be written: {reason}\n"
        "Choose a path in a folder that this process may write to, on a disk with free space"
    )


def _not_whole(path: Path, reason: str) -> AdapterError:
    return AdapterError(
        f"{path} is not a whole safetensors file: {reason}. The writer may have been interrupted. "
        "Write the file again, or use an earlier file"
    )
