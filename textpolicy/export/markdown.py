"""Markdown for a model card, in which text of other people stays text."""

import re
from collections.abc import Sequence

from textpolicy.untrusted.terminal import terminal_safe

_MOST_CHARACTERS = 200


def code(text: str) -> str:
    """Return the text as a code span on one line, of bounded length.

    Markdown and HTML have no meaning in a code span, and a span ends only at as many backticks as
    it began with.
    """
    line = one_line(text)
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    # The renderer takes the two spaces away.
    return f"{ticks} {line} {ticks}" if "`" in line else f"{ticks}{line}{ticks}"


def plain(text: str) -> str:
    """Return the text as a paragraph in which no character has a meaning for Markdown or HTML."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", one_line(text, most=2000))


def one_line(text: str, *, most: int = _MOST_CHARACTERS) -> str:
    """Return the text on one line of bounded length, without characters that could hide text."""
    line = " ".join(terminal_safe(text).split()) or "(empty)"
    more = len(line) - most
    return line if more <= 0 else f"{line[:most]}… ({more:,} more characters)"


def code_block(lines: Sequence[str]) -> str:
    """Return the lines as a fenced block of bash, which no line can end."""
    text = "\n".join(terminal_safe(line).replace("\n", "\\n") for line in lines)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}bash\n{text}\n{fence}"


def markdown_table(rows: Sequence[tuple[str, str]]) -> str:
    """Return names and values as a table. A value is Markdown of ours, with `code` for the rest."""
    cells = [(name, value.replace("|", "\\|")) for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)])
