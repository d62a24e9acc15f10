"""What the files of a base model say about it: its id on the hub, and its licence."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from textpolicy.errors import UnreadableError
from textpolicy.export.markdown import one_line
from textpolicy.untrusted.files import read_utf8

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)", re.ASCII)
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
_FRONT_MATTER = re.compile(r"---[ \t]*\r?\n(.*?)\r?\n---", re.DOTALL)
_FRONT_LINE = re.compile(r"^(license\w*):[ \t]*[\"']?([^\"'\r\n]*?)[\"']?[ \t]*\r?$", re.MULTILINE)
_LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")
_KNOWN_TEXTS = {
    "apache-2.0": re.compile(r"Apache License\s+Version 2\.0"),
    "mit": re.compile(r"MIT License|Permission is hereby granted, free of charge"),
}


def hub_id(name: str, folder: Path) -> str | None:
    """Return the id of the base on the hub, if its name or its folder in the cache has one."""
    for part in folder.absolute().parts:
        if match := _CACHED.fullmatch(part):
            return f"{match[1]}/{match[2]}"
    return name if is_hub_id(name) and not Path(name).expanduser().exists() else None


def is_hub_id(name: str) -> bool:
    """Return whether the text has the form of the id of a repository on the hub."""
    return _HUB_ID.fullmatch(name) is not None


def licence_of(folder: Path, architecture: Mapping[str, Any]) -> dict[str, str]:
    """Return the fields of the front matter about the licence of the base, or none.

    The model card of the base is asked first, then its config, and then its licence file.
    """
    stated = _front_matter(folder / "README.md")
    name = stated.get("license") or str(architecture.get("license", ""))
    if _LICENCE.fullmatch(name):
        more = {
            key: one_line(stated[key]) for key in ("license_name", "license_link") if key in stated
        }
        return {"license": name} | more
    for text in filter(None, (_text_of(folder / file) for file in _LICENCE_FILES)):
        known = (name for name, words in _KNOWN_TEXTS.items() if words.search(text))
        return {"license": next(known, "other")}
    return {}


def _front_matter(path: Path) -> dict[str, str]:
    """Return the lines about the licence in the front matter of a model card."""
    match = _FRONT_MATTER.match(_text_of(path))
    return {key: value for key, value in _FRONT_LINE.findall(match[1]) if value} if match else {}


def _text_of(path: Path) -> str:
    try:
        return read_utf8(path)
    except UnreadableError:
        return ""
