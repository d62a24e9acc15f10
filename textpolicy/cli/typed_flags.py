"""Settings and paths as a person types them."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from textpolicy.config.option_types import UNSET
from textpolicy.config.settings import Setting

# A word that is read as itself inside of a table.
_PLAIN_WORD = re.compile(r"(?!(?:true|false|True|False|inf|nan)$)[A-Za-z_][\w./-]*")


def short_path(path: Path) -> str:
    """Return a path as a person would type it: relative if it is below the working directory."""
    relative = os.path.relpath(path)
    # A name that begins with a dash would be read as a flag.
    return str(path) if relative.startswith(("..", "-")) else relative


def flag_words(setting: Setting) -> list[str]:
    """Return the flag of a setting and its value, as they are typed."""
    value = setting.default
    if setting.annotation is bool:
        return [setting.flag if value else setting.flag.replace("--", "--no-", 1)]
    if isinstance(value, Mapping) and all(map(_is_plain_entry, value.items())):
        return [setting.flag, *(f"{name}={one}" for name, one in value.items())]
    text = text_of(value)
    # A value that begins with a dash would be read as a flag.
    return [f"{setting.flag}={text}"] if text.startswith("-") else [setting.flag, text]


def _is_plain_entry(entry: tuple[Any, Any]) -> bool:
    name, value = entry
    if not isinstance(value, str) or _PLAIN_WORD.fullmatch(value) is None:
        return False
    return name.isascii() and name.isidentifier()


def text_of(value: Any) -> str:
    """Return a value as flags and --set read it."""
    if value is None:
        return UNSET
    if isinstance(value, tuple):
        return ",".join(value)
    if isinstance(value, Path):
        return short_path(value)
    return value if isinstance(value, str) else json.dumps(value)
