"""One file is one adapter: tensors, config, version and the fingerprint of its base.

A file is written under a temporary name in the same folder, flushed and renamed, so that a reader
sees the adapter before or the adapter after and never a part of one.
"""

import json
import os
import secrets
import struct
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from textpolicy.adapters.config import AdapterConfig
from textpolicy.errors import AdapterError, ConfigError

FORMAT = "textpolicy.adapter"
FORMAT_VERSION = 1
_SUFFIX = ".safetensors"
_METADATA = "__metadata__"
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterFile:
    """The content of an adapter file, in memory.

    `quantization` holds the arguments of `quantize` that made the base, or None for a float base.
    """

    path: Path
    arrays: Mapping[str, mx.array]
    config: AdapterConfig
    version: int
    fingerprint: str
    quantization: Mapping[str, Any] | None


class AdapterWatcher:
    """Notices new adapters in a file. What lies there already when watching begins is not new."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self._seen = self._found = _signature(self.path)

    def poll(self) -> Path | None:
        """The path, if its file is another one than the last that was accepted."""
        self._found = _signature(self.path)
        return None if self._found in (None, self._seen) else self.path

    def accept(self) -> None:
        """What the last poll found is in use; a file that could not be used is found again."""
        self._seen = self._found


def peek_version(path: str | Path) -> int:
    """The adapter version in a file, from its first kilobytes."""
    path = Path(path)
    header = _read_header(path)
    return int(_checked(path, header.get(_METADATA) or {})["version"])


def read_adapter(path: str | Path) -> AdapterFile:
    """The whole adapter, evaluated: a file that is replaced later does not change it."""
    path = Path(path)
    _read_header(path)
    try:
        # Metadata and tensors of one opening: the file may be replaced at any moment.
        arrays, metadata = cast(Any, mx.load(str(path), return_metadata=True))
        mx.eval(arrays)
        metadata = _checked(path, metadata)
        config = AdapterConfig.from_dict(json.loads(metadata["config"]))
    except (RuntimeError, ConfigError, json.JSONDecodeError) as error:
        raise AdapterError(f"{path} cannot be read as an adapter: {error}") from error
    return AdapterFile(
        path=path,
        arrays=arrays,
        config=config,
        version=int(metadata["version"]),
        fingerprint=metadata["base_fingerprint"],
        quantization=json.loads(metadata["base_quantization"]),
    )


def write_adapter(
    path: str | Path,
    arrays: Mapping[str, mx.array],
    *,
    config: AdapterConfig,
    version: int,
    fingerprint: str,
    quantization: Mapping[str, Any] | None = None,
) -> Path:
    """Replace the file at `path` by these adapters in one step; returns its absolute path."""
    target = destination(path)
    if not arrays:
        raise AdapterError(f"there are no adapter tensors to write to {target}")
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "version": str(version),
        "base_fingerprint": fingerprint,
        "base_quantization": json.dumps(quantization),
        "config": json.dumps(config.to_dict()),
    }
    with _replacing(target) as temporary:
        mx.save_safetensors(str(temporary), dict(arrays), metadata)
    return target


def destination(path: str | Path) -> Path:
    """The absolute path of an adapter file to be, its folder made; an error if it cannot be."""
    target = Path(path).expanduser().absolute()
    if target.suffix != _SUFFIX:
        raise AdapterError(f"{target} cannot hold adapters: expected a name ending in {_SUFFIX}")
    if target.is_dir():
        raise AdapterError(f"{target} is a folder; expected the name of an adapter file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(target, error) from error
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise _unwritable(target, "no permission to write in its folder")
    _check_replaceable(target)
    return target


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


@contextmanager
def _replacing(target: Path) -> Generator[Path]:
    """A temporary name beside `target`, moved onto it when the block has written it."""
    # mx.save_safetensors appends its suffix to a name that does not end in it.
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(6)}{_SUFFIX}")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, target)
        _flush(target.parent)
    except (OSError, RuntimeError) as error:
        raise _unwritable(target, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(target: Path, reason: object) -> AdapterError:
    return AdapterError(
        f"adapters cannot be written to {target}: {reason}\n"
        "Choose a path in a folder that this process may write to, on a disk with room"
    )


def _read_header(path: Path) -> dict[str, Any]:
    """A safetensors header (8 bytes of length, then that much JSON) of a file of the right size."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(_LENGTH.size)
            length = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else size
            text = file.read(length) if length < size else b""
    except IsADirectoryError as error:
        raise AdapterError(
            f"{path} is a folder; expected one adapter file ending in {_SUFFIX}"
        ) from error
    except OSError as error:
        raise AdapterError(f"no adapter can be read from {path}: {error.strerror}") from error
    try:
        header = json.loads(text)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != _METADATA]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _not_whole(path, "it has no safetensors header") from error
    if size != (expected := _LENGTH.size + length + max(ends, default=0)):
        raise _not_whole(path, f"it has {size} bytes, its header announces {expected}")
    return header


def _checked(path: Path, metadata: Mapping[str, str]) -> Mapping[str, str]:
    if metadata.get("format") != FORMAT:
        raise AdapterError(
            f"{path} holds tensors but is not an adapter file of this library (its format is "
            f"{metadata.get('format')!r}, expected {FORMAT!r}). Adapter files are written by "
            "save_adapters and by AdapterContainer.publish"
        )
    if (version := metadata.get("format_version")) != str(FORMAT_VERSION):
        raise AdapterError(
            f"{path} has adapter format version {version}; this library reads {FORMAT_VERSION}. "
            "Install the release that wrote it, or a newer one"
        )
    return metadata


def _not_whole(path: Path, reason: str) -> AdapterError:
    return AdapterError(
        f"{path} is not a whole adapter file: {reason}. Was its writing interrupted? "
        "Publish it again, or use an earlier version"
    )


def _signature(path: Path) -> tuple[int, ...] | None:
    # File times are coarse and inode numbers are reused, so the version in the header decides.
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_mtime_ns, stat.st_ino, stat.st_size, peek_version(path)
