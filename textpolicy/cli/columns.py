"""Several answers on the terminal while they are sampled: in columns, or one below the other."""

import unicodedata
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from textpolicy.cli.output import print_answer, rewrite_line, terminal_width
from textpolicy.untrusted.terminal import terminal_safe

_LEAST_WIDTH = 36
"""The width of a column below which answers are shown one below the other."""
_BETWEEN = " │ "
_TAB = "    "


@runtime_checkable
class AnswersView(Protocol):
    """Shows several answers piece by piece. `end` is called once for each answer, after its pieces.

    An answer that has `failed` has no pieces.
    """

    def add(self, number: int, piece: str) -> None: ...
    def end(self, number: int, *, failed: bool = False) -> None: ...


def open_view(names: Sequence[str]) -> AnswersView:
    """Return columns if the terminal is wide enough for one beside the other, or else a list."""
    # The last place of a line stays free: some terminals begin a new line after it.
    places = (terminal_width() or 0) - 1 - len(_BETWEEN) * (len(names) - 1)
    width = places // len(names)
    if len(names) > 1 and width >= _LEAST_WIDTH:
        return Columns(names, width)
    return AnswerList(names)


class NoView:
    """Shows nothing."""

    def add(self, number: int, piece: str) -> None:
        """Show no piece."""

    def end(self, number: int, *, failed: bool = False) -> None:
        """Show no end."""


class AnswerList:
    """Answers one below the other. The first that has not ended is shown as it comes."""

    def __init__(self, names: Sequence[str]) -> None:
        # What each answer has that is not shown yet, its name included.
        self._waiting = [f"[{name}] " if len(names) > 1 else "" for name in names]
        self._ended: dict[int, bool] = {}
        self._shown = 0

    def add(self, number: int, piece: str) -> None:
        self._waiting[number] += piece
        self._show()

    def end(self, number: int, *, failed: bool = False) -> None:
        self._ended[number] = failed
        while self._shown in self._ended:
            if not self._ended[self._shown]:
                self._show()
                print_answer("")
            self._shown += 1
        if self._shown < len(self._waiting):
            self._show()

    def _show(self) -> None:
        print_answer(self._waiting[self._shown], end="")
        self._waiting[self._shown] = ""


class Columns:
    """Answers beside each other. A line is left for the next one when every answer has passed it.

    Only the last line on the screen is ever rewritten, so the screen may be of any height.
    """

    def __init__(self, names: Sequence[str], width: int) -> None:
        self._width = width
        self._columns = [_Column(width) for _ in names]
        self._line = 0
        print_answer(self._joined([cut_to_width(terminal_safe(name), width) for name in names]))
        print_answer("─┼─".join("─" * width for _ in names))

    def add(self, number: int, piece: str) -> None:
        self._columns[number].add(piece)
        self._show()

    def end(self, number: int, *, failed: bool = False) -> None:
        self._columns[number].ended = True
        self._show()
        if all(column.ended for column in self._columns):
            print_answer("")

    def _show(self) -> None:
        while all(column.has_passed(self._line) for column in self._columns):
            if not any(len(column.lines) > self._line + 1 for column in self._columns):
                break
            self._rewrite()
            print_answer("")
            self._line += 1
        self._rewrite()

    def _rewrite(self) -> None:
        rewrite_line(self._joined([column.line(self._line) for column in self._columns]))

    def _joined(self, texts: Sequence[str]) -> str:
        pads = [" " * (self._width - display_width(text)) for text in texts]
        return _BETWEEN.join(text + pad for text, pad in zip(texts, pads, strict=True))


class _Column:
    """The lines of one answer. Only the last line may still change."""

    def __init__(self, width: int) -> None:
        self._width = width
        self.lines = [""]
        self.ended = False

    def add(self, piece: str) -> None:
        text = terminal_safe(piece).replace("\t", _TAB)
        self.lines[-1:] = wrap(self.lines[-1] + text, self._width)

    def has_passed(self, line: int) -> bool:
        return self.ended or len(self.lines) > line + 1

    def line(self, line: int) -> str:
        # The last line may end with a space that no longer fits.
        return cut_to_width(self.lines[line], self._width) if line < len(self.lines) else ""


def wrap(text: str, width: int) -> list[str]:
    """Return the lines of a text that are at most so wide, broken at spaces where there are any.

    The last line keeps its spaces, because more text may follow.
    """
    lines: list[str] = []
    for paragraph in text.split("\n"):
        rest = paragraph
        while display_width(rest.rstrip(" ")) > width:
            most = len(cut_to_width(rest, width))
            space = rest.rfind(" ", 1, most + 1)
            at = space if space > 0 else most
            lines.append(rest[:at])
            rest = rest[at:].removeprefix(" ")
        lines.append(rest)
    return lines


def cut_to_width(text: str, width: int) -> str:
    """Return the beginning of a text that is at most so wide on a terminal."""
    taken = 0
    for index, character in enumerate(text):
        taken += display_width(character)
        if taken > width:
            return text[:index]
    return text


def display_width(text: str) -> int:
    """Return how many places of a terminal a text takes.

    A wide character takes two places, and a combining mark takes none.
    """
    if text.isascii():
        return len(text)
    return sum(_places(character) for character in text)


def _places(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
