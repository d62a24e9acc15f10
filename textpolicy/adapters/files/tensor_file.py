"""Reading and writing safetensors files, and replacing any file in one step.

A file is written under a temporary name in the same folder, flushed and renamed. A reader sees
the old file or the new file, never a part of one.
"""

import json
import os
import re
import struct
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from stat import S_IMODE
from typing import Any, cast

import mlx.core as mx

from textpolicy.errors import AdapterError, UnwritableError

METADATA_KEY = "__metadata__"
TENSOR_SUFFIX = ".safetensors"
_LENGTH = struct.Struct("<Q")
# The number is of the process that writes the file.
_PARTIAL = re.compile(r"\..*\.(\d+)-\w+\.partial(\.\w+)?")
_LONGEST_STEM = 100


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
def atomic_replace(target: Path, *, private: bool = False) -> Generator[Path]:
    """Yield an empty temporary file to write, and rename it to `target` after the block.

    A symbolic link at `target` is replaced, and the file that it names is not changed. Only the
    owner can read a `private` file; others may read another file if they may read its folder.
    """
    temporary: Path | None = None
    try:
        temporary = _new_partial_file(target)
        yield temporary
        os.chmod(temporary, 0o600 if private else 0o666 & ~_umask() & _mode(target.parent))
        flush_to_disk(temporary)
        os.replace(temporary, target)
        flush_to_disk(target.parent)
    except OSError as error:
        raise _unwritable(target, error) from error
    except RuntimeError as error:
        reason = temporary and _why_disk_refuses(temporary)
        raise _unwritable(target, reason or error) from error
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)


def remove_partial_files(folder: Path) -> None:
    """Remove temporary files that a killed process left in the folder.

    The caller must be the single process that writes in this folder, and be between two files.
    Another process that lives may be writing a report there.
    """
    for path in folder.glob(".*.partial*"):
        if match := _PARTIAL.fullmatch(path.name):
            writer = int(match[1])
            if writer == os.getpid() or not _is_alive(writer):
                path.unlink(missing_ok=True)


def _new_partial_file(target: Path) -> Path:
    # mx.save_safetensors appends ".safetensors" to a name with another suffix.
    descriptor, name = tempfile.mkstemp(
        prefix=f".{target.stem[:_LONGEST_STEM]}.{os.getpid()}-",
        suffix=f".partial{target.suffix}",
        dir=target.parent,
    )
    os.close(descriptor)
    return Path(name)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _mode(folder: Path) -> int:
    return S_IMODE(folder.stat().st_mode)


def _umask() -> int:
    # There is no other way to ask. Files that threads make meanwhile are private.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def flush_to_disk(path: Path) -> None:
    """Return when the disk has the content of a file, or the names in a folder."""
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
