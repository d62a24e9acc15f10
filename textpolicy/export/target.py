"""The folder that an export is written to: new, or an earlier export that --force replaces."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from textpolicy.errors import ConfigError, UnreadableError, UnwritableError
from textpolicy.file_writing import make_writable_folder, remove_partial_folders
from textpolicy.machine import free_disk_bytes, size_text
from textpolicy.untrusted.parsing import read_json_object

EXPORT_FILE = "export.json"
_MARK = "textpolicy_export"
_VERSION = 1
_FILE_SUFFIXES = {".gguf", ".safetensors", ".bin", ".json", ".zip"}
# Files that a system or a hub puts beside the files of a folder.
ADDED_BY_OTHERS = {".DS_Store"}
_MARGIN = 50_000_000


def prepare_target(output: Path, *, force: bool) -> Path:
    """Return the absolute path of a folder that may be written, and remove unfinished folders.

    Raise `ConfigError`, with nothing changed, if something is there that an export must not
    replace.
    """
    if output.suffix in _FILE_SUFFIXES:
        raise ConfigError(
            f"{output} is the name of a file, and an export is a folder of several files. Name a "
            f"folder: --output {output.with_suffix('')}"
        )
    target = Path(os.path.abspath(output.expanduser()))
    _check_replaceable(target, force)
    make_writable_folder(target.parent, target)
    remove_partial_folders(target.parent)
    return target


def check_space(target: Path, needed: int) -> None:
    """Raise `UnwritableError` if the disk has no space for this many bytes."""
    free = free_disk_bytes(target.parent)
    if free < needed + _MARGIN:
        raise UnwritableError(
            f"the export takes about {size_text(needed)}, and the disk of {target} has "
            f"{size_text(free)} free. Free some space, or name a folder on another disk"
        )


def write_export_file(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the mark of an export, with the names of all files that belong to the export."""
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    content = {_MARK: _VERSION, **facts, "files": [*files, EXPORT_FILE]}
    (folder / EXPORT_FILE).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _check_replaceable(target: Path, force: bool) -> None:
    if target.is_symlink():
        raise ConfigError(f"{target} is a symbolic link. Name a folder that does not exist yet")
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigError(f"{target} is a file. Name a folder that does not exist yet")
    found = files_in(target)
    if not found:
        return
    if (ours := files_of_export(target)) is None:
        raise ConfigError(
            f"the folder {target} is not empty and is no export of TextPolicy (it has no "
            f"{EXPORT_FILE} of one). Name a folder that does not exist yet"
        )
    if not force:
        raise ConfigError(
            f"{target} holds an export already. Name another folder, or replace the export: --force"
        )
    if others := sorted(found - ours):
        raise ConfigError(
            f"{target} holds an export and files that do not belong to it: {others[0]}"
            f"{f' and {len(others) - 1} more' if others[1:] else ''}. Move these files away, or "
            "name another folder"
        )


def files_in(target: Path) -> set[str]:
    """Return all that is in a folder but its folders, without following links."""
    found: set[str] = set()
    for place, folders, files in os.walk(target):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found |= {os.path.relpath(os.path.join(place, n), target) for n in (*files, *links)}
    return {name for name in found if Path(name).name not in ADDED_BY_OTHERS}


def files_of_export(target: Path) -> set[str] | None:
    """Return the files that an export in the folder consists of, or None if there is no export."""
    try:
        content = read_json_object(target / EXPORT_FILE)
    except UnreadableError:
        return None
    files = content.get("files")
    if _MARK not in content or not isinstance(files, list):
        return None
    return {name for name in files if isinstance(name, str)}
