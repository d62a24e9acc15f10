"""Addresses of rows: a file, a folder or a data set of the hub, with configuration and split."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from textpolicy.errors import DataError

HUB = "hf:"
_FORM = f"{HUB}OWNER/NAME[@REVISION][:CONFIG][:SPLIT]"
_HUB_ADDRESS = re.compile(
    rf"{HUB}(?P<place>\w[\w.-]{{0,95}}(?:/\w[\w.-]{{0,95}})?)"
    r"(?:@(?P<first>[\w./-]{1,96}))?(?P<parts>(?::[^:@\s]{1,96}){0,2})(?:@(?P<last>[\w./-]{1,96}))?",
    re.ASCII,
)
_MOST_PARTS = 2


@dataclass(frozen=True, kw_only=True)
class DataAddress:
    """Where rows are. `parts` are the names after the place: a configuration, a split, or both.

    `place` is the id of a data set on the hub if `on_hub`, and a path otherwise.
    """

    place: str
    on_hub: bool = False
    parts: tuple[str, ...] = ()
    revision: str | None = None

    @classmethod
    def parse(cls, text: str | Path) -> "DataAddress":
        """Return the address in `text`. Raise `DataError` for an address of the hub that is none.

        What exists under the whole text is a path, also if the text has colons.
        """
        text = str(text)
        if not text.startswith(HUB):
            return _local(text)
        match = _HUB_ADDRESS.fullmatch(text)
        if match is None or (match["first"] and match["last"]):
            raise DataError(
                f"{text!r} is not the address of a data set on the hub; expected {_FORM}, for "
                f"example {HUB}openai/gsm8k:main:train"
            )
        parts = tuple(match["parts"].split(":")[1:])
        revision = match["first"] or match["last"]
        return cls(place=match["place"], on_hub=True, parts=parts, revision=revision)

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return ":".join([f"{HUB * self.on_hub}{self.place}{revision}", *self.parts])

    def with_parts(self, *parts: str) -> str:
        """Return the address with other names after the place, as a user would type it."""
        return str(replace(self, parts=parts))

    def absolute(self) -> str:
        """Return the address with an absolute path, if the path exists."""
        path = Path(self.place).expanduser()
        if self.on_hub or not path.exists():
            return str(self)
        return str(replace(self, place=str(path.absolute())))


def _local(text: str) -> DataAddress:
    names: list[str] = []
    place = text
    while not _exists(place) and len(names) < _MOST_PARTS and ":" in place:
        place, _, name = place.rpartition(":")
        names.insert(0, name)
    if names and all(names) and _exists(place):
        return DataAddress(place=place, parts=tuple(names))
    return DataAddress(place=text)


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError):
        return False  # The text is too long for the name of a file, or has a null character.
