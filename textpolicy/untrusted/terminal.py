"""Text that is safe on a terminal, whoever wrote it."""

import unicodedata
from typing import Protocol, runtime_checkable

from textpolicy.untrusted.bounds import MAX_MESSAGE_CHARACTERS

# Control, format (as bidirectional overrides), surrogate, private-use and unassigned characters,
# and the two separators that some terminals take for a line break.
_UNSAFE_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


@runtime_checkable
class TextStream(Protocol):
    """A text file to write progress to."""

    def write(self, text: str, /) -> int: ...
    def flush(self) -> None: ...
    def isatty(self) -> bool: ...


def terminal_safe(text: str) -> str:
    """Return the text with an escape such as \\x1b for each character that is unsafe to print.

    Such characters could move the cursor or hide text. Line breaks and tabs stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char
        if char in "\n\t" or unicodedata.category(char) not in _UNSAFE_CATEGORIES
        else char.encode("unicode_escape").decode()
        for char in text
    )


def shorten_line(text: str, limit: int) -> str:
    """Return a text as one safe line of at most `limit` characters.

    Of a longer text the middle is left out: a prompt often ends with what it asks, and an answer
    with its result.
    """
    line = terminal_safe(text).replace("\n", "⏎").replace("\t", " ")
    if len(line) <= limit:
        return line
    head = (limit - 1) // 3
    return f"{line[:head]}…{line[len(line) - (limit - 1 - head) :]}"


def terminal_message(text: str) -> str:
    """Return an error message that is safe on a terminal, and of bounded length."""
    if len(text) > MAX_MESSAGE_CHARACTERS:
        more = len(text) - MAX_MESSAGE_CHARACTERS
        text = f"{text[:MAX_MESSAGE_CHARACTERS]}… ({more:,} more characters)"
    return terminal_safe(text)
