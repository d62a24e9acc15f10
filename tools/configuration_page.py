"""Write the tables of docs/configuration.md: every option of the configs with its default.

python tools/configuration_page.py          write the tables
python tools/configuration_page.py --check  write nothing; exit with 1 if the tables are out of date
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from textpolicy.config import SFTConfig, TrainConfig
from textpolicy.config.settings import Setting, sections_of, settings_of

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"
TITLES = {"## `textpolicy train`": TrainConfig(), "## `textpolicy sft`": SFTConfig()}
_TITLE_MARK = "## "


def main() -> int:
    text = PAGE.read_text("utf-8")
    written = text
    for title, config in TITLES.items():
        written = with_section(written, title, "\n\n".join(tables(config)))
    if sys.argv[1:] == ["--check"]:
        stale = text != written
        advice = "out of date; run python tools/configuration_page.py" if stale else "up to date"
        print(f"docs/configuration.md is {advice}")
        return int(stale)
    PAGE.write_text(written, "utf-8")
    return 0


def with_section(page: str, title: str, body: str) -> str:
    """Return the page with `body` under a title, in place of all text up to the next title."""
    before, found, rest = page.partition(f"{title}\n")
    if not found:
        raise SystemExit(
            f"{PAGE} has no title {title!r}; the tables of options go under this title"
        )
    _, following, after = rest.partition(f"\n{_TITLE_MARK}")
    return f"{before}{title}\n\n{body}\n{following}{after}"


def tables(config: object) -> Iterator[str]:
    """Yield the heading, the description and the table of each section."""
    for section, about in sections_of(config).items():
        rows = [row(setting) for setting in settings_of(config) if setting.section == section]
        head = ["| name | flag | value | default | meaning |", "|---|---|---|---|---|"]
        yield f"### [{section}]"
        yield f"{about}."
        yield "\n".join([*head, *rows])


def row(setting: Setting) -> str:
    """Return the row of one option."""
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
