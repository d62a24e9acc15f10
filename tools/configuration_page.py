"""Write the generated parts of docs/configuration.md: every option, and the choice of defaults.

python tools/configuration_page.py          write the tables
python tools/configuration_page.py --check  write nothing; exit with 1 if the tables are out of date
"""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

from textpolicy.config import SFTConfig, TrainConfig, model_defaults
from textpolicy.config.model_defaults import ModelSize, defaults_of
from textpolicy.config.settings import ByModel, Setting, sections_of, settings_of

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"
TITLES = {"## `textpolicy train`": TrainConfig(), "## `textpolicy sft`": SFTConfig()}
CHOSEN = "## How the defaults are chosen"
# Widths and millions of weights.
MODELS = {
    "SmolLM2-135M": (576, 135),
    "SmolLM2-360M": (960, 362),
    "Qwen3-0.6B": (1024, 596),
    "Llama-3.2-1B": (2048, 1236),
    "Qwen3-4B": (2560, 4022),
    "Qwen3-8B": (4096, 8191),
}
_TITLE_MARK = "## "


def main() -> int:
    text = PAGE.read_text("utf-8")
    written = with_section(text, CHOSEN, defaults_by_model())
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


def defaults_by_model() -> str:
    """Return the docstring of the rule, and a table of what it gives to models of several sizes."""
    _, _, about = inspect.cleandoc(model_defaults.__doc__ or "").partition("\n\n")
    sizes = [ModelSize(width=width, weights=n * 10**6) for width, n in MODELS.values()]
    chosen = [defaults_of(size) for size in sizes]
    rows = [
        f"| {name} | {width} | {values['trainer.lr']:g} |"
        for (name, (width, _)), values in zip(MODELS.items(), chosen, strict=True)
    ]
    return "\n".join([about, "\n| model | width | rate by the rule |\n|---|---|---|", *rows])


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
        f"`{setting.shown_default}`" if _is_plain(setting.default) else setting.shown_default,
        setting.option.help,
    )
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _is_plain(default: object) -> bool:
    """Return whether the default is a value, not words."""
    return default is not None and not isinstance(default, ByModel)


if __name__ == "__main__":
    sys.exit(main())
