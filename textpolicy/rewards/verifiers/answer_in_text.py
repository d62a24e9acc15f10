"""The answer inside a longer text. Every function reads the text once, however it is made up."""

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"(?<![0-9A-Za-z)\]}])-?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?%?")
_WINDOW = 10_000


def final_answer(
    text: str, *, tags: Sequence[str] = ("answer",), number: bool = True
) -> str | None:
    """What a text gives as its answer, by the first of these that it has.

    The last \\boxed{}, the last complete pair of one of `tags`, what follows the last "####", the
    whole text if it is one short line (after its one "="), the last number. None where there is
    nothing of these.
    """
    if "\\boxed" in text:
        return last_boxed(text)
    for tag in tags:
        if (inside := tagged(text, tag)) is not None:
            return inside
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0]
    if not number:
        return None
    stripped = text.strip()
    if stripped and len(stripped) <= 64 and "\n" not in stripped and not _is_prose(stripped):
        return stripped.partition("=")[2].strip() if stripped.count("=") == 1 else stripped
    return last_number(text)


def last_boxed(text: str) -> str | None:
    """What the last \\boxed{} or \\fbox{} holds; None if there is none or its brace stays open."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    opening = text.find("{", start)
    if start < 0 or opening < 0 or text[start:opening].strip() not in ("\\boxed", "\\fbox"):
        return None
    depth = 0
    for place in range(opening, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[opening + 1 : place].strip()
    return None


def last_number(text: str) -> str | None:
    """The last number of a text as it is written: 1,234.5 or 3/4 or -20%."""
    found = [match[0] for match in _NUMBER.finditer(text[-_WINDOW:])]
    return found[-1].rstrip(",") if found else None


def tagged(text: str, tag: str) -> str | None:
    """What the last complete <tag>...</tag> holds; None if there is none."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    end = text.rfind(closing)
    start = text.rfind(opening, 0, end) if end >= 0 else -1
    return text[start + len(opening) : end].strip() if start >= 0 else None


def _is_prose(text: str) -> bool:
    """Words around a number, or two in a row: the number is what counts, not the line."""
    if "\\" in text:
        return False
    beside_number = re.search(r"[0-9]", text) and re.search(r"[^\W\d_]{4,}(?:[\s,.;:]|$)", text)
    return bool(beside_number or re.search(r"[^\W\d_]{2,}[\s,]+[^\W\d_]{2,}", text))
