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


def terminal_message(text: str) -> str:
    """Return an error message that is safe on a terminal, and of bounded length."""
    if len(text) > MAX_MESSAGE_CHARACTERS:
        more = len(text) - MAX_MESSAGE_CHARACTERS
        text = f"{text[:MAX_MESSAGE_CHARACTERS]}… ({more:,} more characters)"
    return terminal_safe(text)
