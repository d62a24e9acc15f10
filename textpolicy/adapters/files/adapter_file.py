"""The adapter file: tensors, config, version and base fingerprint of one adapter in one file."""

import json
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from textpolicy.adapters.adapter import Adapter
from textpolicy.adapters.config.adapter_config import AdapterConfig
from textpolicy.adapters.files.tensor_file import (
    CHECKSUM_KEY,
    METADATA_KEY,
    TENSOR_SUFFIX,
    read_tensor_header,
    read_tensors,
    write_tensors,
)
from textpolicy.errors import AdapterError
from textpolicy.file_writing import make_writable_folder
from textpolicy.untrusted.parsing import parse_json

_FORMAT = "textpolicy.adapter"
_FORMAT_VERSION = 2
# Files of the first version have no checksum.
_FIRST_FORMAT_VERSION = 1


def read_adapter_file(path: str | Path) -> Adapter:
    """Return the adapter of a file, evaluated, so that replacing the file later has no effect."""
    path = Path(path)
    arrays, metadata = read_tensors(path)
    _check_format(path, metadata)
    _check_has_checksum(path, metadata)
    with name_path_in_errors(path):
        config = AdapterConfig.from_dict(parse_json(metadata["config"]))
    return Adapter(origin=str(path), arrays=arrays, config=config, **read_facts(path, metadata))


def write_adapter_file(path: str | Path, adapter: Adapter) -> Path:
    """Write an adapter, replacing the file in one step. Returns the absolute path."""
    target = prepare_adapter_path(path)
    write_tensors(target, adapter.arrays, adapter_metadata(adapter))
    return target


def peek_version(path: str | Path) -> int:
    """Return the adapter version in a file. Only the header is read."""
    path = Path(path)
    return _read_version(path, read_tensor_header(path)[0])


def file_signature(path: Path) -> tuple[int, ...] | None:
    """Return numbers that change whenever the adapter in the file does, or None without a file."""
    # File times are coarse and inode numbers are reused, so the version is part of it.
    if not path.exists():
        return None
    header, stat = read_tensor_header(path)
    return stat.st_mtime_ns, stat.st_ino, stat.st_size, _read_version(path, header)


def prepare_adapter_path(path: str | Path) -> Path:
    """Return the absolute path for an adapter file, and make its folder.

    Raise AdapterError if no adapter file can be written there.
    """
    target = Path(path).expanduser().absolute()
    if target.suffix != TENSOR_SUFFIX:
        raise AdapterError(
            f"{target} cannot hold adapters: expected a name ending in {TENSOR_SUFFIX}"
        )
    if target.is_dir():
        raise AdapterError(f"{target} is a folder; expected the name of an adapter file")
    make_writable_folder(target.parent, target)
    try:
        # A file with other contents may hold somebody's weights.
        if target.exists() and target.stat().st_size > 0:
            peek_version(target)
    except AdapterError as error:
        raise AdapterError(
            f"{target} exists and is not an adapter file of this library, so it will not be "
            "replaced. Choose another path, or move the file away"
        ) from error
    return target


def adapter_metadata(adapter: Adapter) -> dict[str, str]:
    """Return everything of an adapter except its tensors, as the header of a file stores it."""
    return {
        "format": _FORMAT,
        "format_version": str(_FORMAT_VERSION),
        "version": str(adapter.version),
        "base_fingerprint": adapter.fingerprint or "",
        "base_quantization": json.dumps(adapter.quantization),
        "config": json.dumps(adapter.config.to_dict()),
    }


def has_our_format(metadata: Mapping[str, str]) -> bool:
    """Return whether a file's metadata says that this library wrote the adapter."""
    return metadata.get("format") == _FORMAT


def read_facts(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the version and the base of an adapter, as arguments of `Adapter`."""
    with name_path_in_errors(path):
        return {
            "version": int(metadata["version"]),
            "fingerprint": metadata["base_fingerprint"] or None,
            "quantization": parse_json(metadata["base_quantization"]),
        }


@contextmanager
def name_path_in_errors(path: Path) -> Generator[None]:
    """Turn an error about a file's contents into an AdapterError that names the path."""
    try:
        yield
    except KeyError as error:
        raise AdapterError(f"{path} cannot be read as an adapter: it has no {error}") from error
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{path} cannot be read as an adapter: {error}") from error


def _read_version(path: Path, header: Mapping[str, Any]) -> int:
    metadata = header.get(METADATA_KEY) or {}
    _check_format(path, metadata)
    with name_path_in_errors(path):
        return int(metadata["version"])


def _check_has_checksum(path: Path, metadata: Mapping[str, str]) -> None:
    """Raise AdapterError if a file lost its checksum. A file of the first version has none."""
    if CHECKSUM_KEY in metadata:
        return
    if metadata["format_version"] != str(_FIRST_FORMAT_VERSION):
        raise AdapterError(
            f"{path} is damaged: its checksum is missing. Use an earlier file, or write it again"
        )
    warnings.warn(
        f"{path} has no checksum, because an earlier release wrote it: damage would not be "
        "noticed. Save the adapter again to give it one",
        stacklevel=3,
    )


def _check_format(path: Path, metadata: Mapping[str, str]) -> None:
    if not has_our_format(metadata):
        raise AdapterError(
            f"{path} holds tensors but is not an adapter file of this library (its format is "
            f"{metadata.get('format')!r}, expected {_FORMAT!r}). save_adapters and "
            "AdapterContainer.publish write adapter files. To read adapters of another library, "
            "pass the folder that holds adapter_config.json"
        )
    known = [str(_FIRST_FORMAT_VERSION), str(_FORMAT_VERSION)]
    if (version := metadata.get("format_version")) not in known:
        raise AdapterError(
            f"{path} has adapter format version {version}; this library reads "
            f"{' and '.join(known)}. Install the release that wrote the file, or a newer release"
        )
