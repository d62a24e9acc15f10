"""One file is one adapter: tensors, config, version and the fingerprint of its base.

A file is written under a temporary name in the same folder, flushed and renamed, so that a reader
sees the adapter before or the adapter after and never a part of one.
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

from textpolicy.adapters.adapter import Adapter
from textpolicy.adapters.config.adapter_config import AdapterConfig
from textpolicy.errors import AdapterError, UnwritableError

FORMAT = "textpolicy.adapter"
FORMAT_VERSION = 1
SUFFIX = ".safetensors"
METADATA = "__metadata__"
_LENGTH = struct.Struct("<Q")
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{12}\.\w+")


def peek_version(path: str | Path) -> int:
    """The adapter version in a file, from its first kilobytes."""
    return _version(Path(path), read_header(Path(path))[0])


def signature(path: Path) -> tuple[int, ...] | None:
    """Numbers that differ for two adapters that were in the file, or None if there is no file."""
    # File times are coarse and inode numbers are reused, so the version in the header decides.
    if not path.exists():
        return None
    header, stat = read_header(path)
    return stat.st_mtime_ns, stat.st_ino, stat.st_size, _version(path, header)


def read_file(path: str | Path) -> Adapter:
    """The whole adapter, evaluated: a file that is replaced later does not change it."""
    path = Path(path)
    arrays, metadata = read_tensors(path)
    metadata = _checked(path, metadata)
    with parsing(path):
        return Adapter(
            origin=str(path),
            arrays=arrays,
            config=AdapterConfig.from_dict(json.loads(metadata["config"])),
            version=int(metadata["version"]),
            fingerprint=metadata["base_fingerprint"] or None,
            quantization=json.loads(metadata["base_quantization"]),
        )


def write_file(path: str | Path, adapter: Adapter) -> Path:
    """Replace the file at `path` by this adapter in one step; returns its absolute path."""
    target = destination(path)
    write_tensors(target, adapter.arrays, metadata_of(adapter))
    return target


def metadata_of(adapter: Adapter) -> dict[str, str]:
    """All of an adapter but its tensors, as it stands in the header of its file."""
    return {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "version": str(adapter.version),
        "base_fingerprint": adapter.fingerprint or "",
        "base_quantization": json.dumps(adapter.quantization),
        "config": json.dumps(adapter.config.to_dict()),
    }


def read_tensors(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The tensors and the metadata of a whole safetensors file, evaluated."""
    read_header(path)
    try:
        # Metadata and tensors of one opening: the file may be replaced at any moment.
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
    with replacing(target) as temporary:
        mx.save_safetensors(str(temporary), dict(arrays), dict(metadata))


def destination(path: str | Path) -> Path:
    """The absolute path of an adapter file to be, its folder made; an error if it cannot be."""
    target = Path(path).expanduser().absolute()
    if target.suffix != SUFFIX:
        raise AdapterError(f"{target} cannot hold adapters: expected a name ending in {SUFFIX}")
    if target.is_dir():
        raise AdapterError(f"{target} is a folder; expected the name of an adapter file")
    make_folder(target.parent, target)
    _check_replaceable(target)
    return target


def make_folder(folder: Path, target: Path) -> None:
    """Make the folder that `target` is to be in; an error if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(target, error) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _unwritable(target, "no permission to write in its folder")


@contextmanager
def replacing(target: Path) -> Generator[Path]:
    """A temporary name beside `target`, moved onto it when the block has written it."""
    # mx.save_safetensors appends its suffix to a name that does not end in it.
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(6)}{target.suffix}")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, target)
        _flush(target.parent)
    except OSError as error:
        raise _unwritable(target, error) from error
    except RuntimeError as error:
        raise _unwritable(target, _refusal(temporary) or error) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_partial(folder: Path) -> None:
    """Remove what a process was writing in the folder when it was killed.

    For the folder's only writer, between two files.
    """
    for path in folder.glob(".*"):
        if _PARTIAL.fullmatch(path.name):
            path.unlink()


def read_header(path: Path) -> tuple[dict[str, Any], os.stat_result]:
    """The header (8 bytes of length, then that much JSON) of a safetensors file of the right size.

    The file's other facts come with it, because another file may be in its place the next moment.
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
            f"{path} is a folder; expected one adapter file ending in {SUFFIX}"
        ) from error
    except OSError as error:
        raise AdapterError(f"no adapter can be read from {path}: {error.strerror}") from error
    try:
        header = json.loads(text)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != METADATA]
        expected = _LENGTH.size + length + max(ends, default=0)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _not_whole(path, "it has no safetensors header") from error
    if size != expected:
        raise _not_whole(path, f"it has {size} bytes, its header announces {expected}")
    return header, stat


@contextmanager
def parsing(path: Path) -> Generator[None]:
    """Whatever is wrong with the words in a file becomes one error that names the file."""
    try:
        yield
    except KeyError as error:
        raise AdapterError(f"{path} cannot be read as an adapter: it has no {error}") from error
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{path} cannot be read as an adapter: {error}") from error


def is_ours(metadata: Mapping[str, str]) -> bool:
    """Whether a header's metadata is that of an adapter of this library."""
    return metadata.get("format") == FORMAT


def _version(path: Path, header: Mapping[str, Any]) -> int:
    metadata = _checked(path, header.get(METADATA) or {})
    with parsing(path):
        return int(metadata["version"])


def _check_replaceable(target: Path) -> None:
    """Refuse to replace what may be somebody's weights."""
    if not target.exists() or target.stat().st_size == 0:
        return
    try:
        peek_version(target)
    except AdapterError as error:
        raise AdapterError(
            f"{target} exists and is not an adapter file of this library, so it will not be "
            "replaced: choose another path, or move it away"
        ) from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refusal(path: Path) -> str | None:
    """Why the system takes no more bytes, which mlx does not say; None if it does take some."""
    try:
        with path.open("ab") as file:
            file.write(bytes(1 << 16))
    except OSError as error:
        return error.strerror
    return None


def _unwritable(target: Path, reason: object) -> UnwritableError:
    return UnwritableError(
        f"{target} cannot be written: {reason}\n"
        "Choose a path in a folder that this process may write to, on a disk with room"
    )


def _checked(path: Path, metadata: Mapping[str, str]) -> Mapping[str, str]:
    if not is_ours(metadata):
        raise AdapterError(
            f"{path} holds tensors but is not an adapter file of this library (its format is "
            f"{metadata.get('format')!r}, expected {FORMAT!r}). Adapter files are written by "
            "save_adapters and by AdapterContainer.publish; of another library's adapters, pass "
            "the folder that adapter_config.json is in"
        )
    if (version := metadata.get("format_version")) != str(FORMAT_VERSION):
        raise AdapterError(
            f"{path} has adapter format version {version}; this library reads {FORMAT_VERSION}. "
            "Install the release that wrote it, or a newer one"
        )
    return metadata


def _not_whole(path: Path, reason: str) -> AdapterError:
    return AdapterError(
        f"{path} is not a whole safetensors file: {reason}. Was its writing interrupted? "
        "Write it again, or use an earlier one"
    )
