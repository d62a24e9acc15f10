"""One file is one adapter: tensors, config, version and the fingerprint of its base.

A file is written under a temporary name in the same folder, flushed and renamed, so that a reader
sees the adapter before or the adapter after and never a part of one.
"""

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from textpolicy.adapters.adapter import Adapter
from textpolicy.adapters.config.adapter_config import AdapterConfig
from textpolicy.adapters.files.tensor_file import (
    METADATA_KEY,
    TENSOR_SUFFIX,
    make_writable_folder,
    read_tensor_header,
    read_tensors,
    write_tensors,
)
from textpolicy.errors import AdapterError

_FORMAT = "textpolicy.adapter"
_FORMAT_VERSION = 1


def peek_version(path: str | Path) -> int:
    """The adapter version in a file, from its first kilobytes."""
    return _version(Path(path), read_tensor_header(Path(path))[0])


def file_signature(path: Path) -> tuple[int, ...] | None:
    """Numbers that differ for two adapters that were in the file, or None if there is no file."""
    # File times are coarse and inode numbers are reused, so the version in the header decides.
    if not path.exists():
        return None
    header, stat = read_tensor_header(path)
    return stat.st_mtime_ns, stat.st_ino, stat.st_size, _version(path, header)


def read_adapter_file(path: str | Path) -> Adapter:
    """The whole adapter, evaluated: a file that is replaced later does not change it."""
    path = Path(path)
    arrays, metadata = read_tensors(path)
    metadata = _checked(path, metadata)
    with name_file_in_errors(path):
        return Adapter(
            origin=str(path),
            arrays=arrays,
            config=AdapterConfig.from_dict(json.loads(metadata["config"])),
            version=int(metadata["version"]),
            fingerprint=metadata["base_fingerprint"] or None,
            quantization=json.loads(metadata["base_quantization"]),
        )


def write_adapter_file(path: str | Path, adapter: Adapter) -> Path:
    """Replace the file at `path` by this adapter in one step; returns its absolute path."""
    target = prepare_adapter_path(path)
    write_tensors(target, adapter.arrays, adapter_metadata(adapter))
    return target


def adapter_metadata(adapter: Adapter) -> dict[str, str]:
    """All of an adapter but its tensors, as it stands in the header of its file."""
    return {
        "format": _FORMAT,
        "format_version": str(_FORMAT_VERSION),
        "version": str(adapter.version),
        "base_fingerprint": adapter.fingerprint or "",
        "base_quantization": json.dumps(adapter.quantization),
        "config": json.dumps(adapter.config.to_dict()),
    }


def prepare_adapter_path(path: str | Path) -> Path:
    """The absolute path of an adapter file to be, its folder made; an error if it cannot be."""
    target = Path(path).expanduser().absolute()
    if target.suffix != TENSOR_SUFFIX:
        raise AdapterError(
            f"{target} cannot hold adapters: expected a name ending in {TENSOR_SUFFIX}"
        )
    if target.is_dir():
        raise AdapterError(f"{target} is a folder; expected the name of an adapter file")
    make_writable_folder(target.parent, target)
    _check_replaceable(target)
    return target


@contextmanager
def name_file_in_errors(path: Path) -> Generator[None]:
    """Whatever is wrong with the words in a file becomes one error that names the file."""
    try:
        yield
    except KeyError as error:
        raise AdapterError(f"{path} cannot be read as an adapter: it has no {error}") from error
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{path} cannot be read as an adapter: {error}") from error


def has_our_format(metadata: Mapping[str, str]) -> bool:
    """Whether a header's metadata is that of an adapter of this library."""
    return metadata.get("format") == _FORMAT


def _version(path: Path, header: Mapping[str, Any]) -> int:
    metadata = _checked(path, header.get(METADATA_KEY) or {})
    with name_file_in_errors(path):
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


def _checked(path: Path, metadata: Mapping[str, str]) -> Mapping[str, str]:
    if not has_our_format(metadata):
        raise AdapterError(
            f"{path} holds tensors but is not an adapter file of this library (its format is "
            f"{metadata.get('format')!r}, expected {_FORMAT!r}). Adapter files are written by "
            "save_adapters and by AdapterContainer.publish; of another library's adapters, pass "
            "the folder that adapter_config.json is in"
        )
    if (version := metadata.get("format_version")) != str(_FORMAT_VERSION):
        raise AdapterError(
            f"{path} has adapter format version {version}; this library reads {_FORMAT_VERSION}. "
            "Install the release that wrote it, or a newer one"
        )
    return metadata
