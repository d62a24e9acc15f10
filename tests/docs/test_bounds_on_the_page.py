"""The page of reliability names every bound on files from elsewhere."""

from pathlib import Path

import pytest

from textpolicy.untrusted import bounds

PAGE = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text("utf-8")
BOUNDS = {name: value for name, value in vars(bounds).items() if name.startswith("MAX_")}
UNITS = {"MiB": 2**20, "KiB": 2**10}


def spellings(value: float) -> set[str]:
    """Return the ways to write a bound on the page."""
    in_units = {f"{value // size:,} {unit}" for unit, size in UNITS.items() if value % size == 0}
    return in_units | {f"{value:,}" if value != 1 else "1 second"}


@pytest.mark.parametrize("name", BOUNDS)
def test_the_page_names_the_bound(name):
    _, _, section = PAGE.partition("## Bounds on files from elsewhere")
    section, _, _ = section.partition("\n## ")
    written = section.replace("|", " ").replace(",  ", " ").split()
    words = [
        f"{word} {unit}".rstrip(",") for word, unit in zip(written, [*written[1:], ""], strict=True)
    ]
    assert spellings(BOUNDS[name]) & {*words, *(word.rstrip(",") for word in written)}
