"""Write the tables of docs/configuration.md from the configs: every option with its default.

python tools/configuration_page.py          write the page
python tools/configuration_page.py --check  exit with 1 if the page is not what would be written
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from textpolicy.config import SFTConfig, TrainConfig
from textpolicy.config.settings import Setting, sections_of, settings_of

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"
TITLES = {"## `textpolicy train`": TrainConfig(), "## `textpolicy sft`": SFTConfig()}
_END = "## "


def main() -> int:
    text = PAGE.read_text("utf-8")
    written = text
    for title, config in TITLES.items():
        written = replaced(written, title, "\n\n".join(tables(config)))
    if sys.argv[1:] == ["--check"]:
        print("stale: docs/configuration.md" if text != written else "the page is as the code is")
        return int(text != written)
    PAGE.write_text(written, "utf-8")
    return 0


def replaced(page: str, title: str, body: str) -> str:
    """The page with another body under a title, up to the next title of its kind."""
    before, found, rest = page.partition(f"{title}\n")
    if not found:
        raise SystemExit(f"{PAGE} has no line {title!r} to write the options under")
    _, following, after = rest.partition(f"\n{_END}")
    return f"{before}{title}\n\n{body}\n{following}{after}"


def tables(config: object) -> Iterator[str]:
    """A heading and a table for each section."""
    for section, about in sections_of(config).items():
        rows = [row(setting) for setting in settings_of(config) if setting.section == section]
        head = ["| name | flag | value | default | meaning |", "|---|---|---|---|---|"]
        yield f"### [{section}]"
        yield f"{about}."
        yield "\n".join([*head, *rows])


def row(setting: Setting) -> str:
    """One option."""
    cells = (
        f"`{setting.name}`",
        f"`{setting.flag}`",
        setting.expected,
        setting.shown_default if setting.default is None else f"`{setting.shown_default}`",
        setting.option.help,
    )
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    sys.exit(main())
