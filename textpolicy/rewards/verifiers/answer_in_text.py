"""Find the answer, or the content of a tag, inside a longer text.

Every function reads the text once, for any text.
"""

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"(?<![0-9A-Za-z)\]}])-?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?%?")
_MAX_SEARCHED = 10_000
_MAX_SHORT_LINE = 64


def final_answer(
    text: str, *, tags: Sequence[str] = ("answer",), number: bool = True
) -> str | None:
    """Return the answer that a text gives, or None if there is none.

    The answer is the first of these that the text has: the last \\boxed{}, the last complete pair
    of one of `tags`, the line after the last "####", the whole text if it is one short line (the
    part after "=" if there is one "="), the last number. The last two count only with `number`.
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
    line = text.strip()
    if line and len(line) <= _MAX_SHORT_LINE and "\n" not in line and not _is_prose(line):
        return line.partition("=")[2].strip() if line.count("=") == 1 else line
    return last_number(text)


def last_boxed(text: str) -> str | None:
    """Return the content of the last \\boxed{} or \\fbox{}, or None without a complete one."""
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
    """Return the last number of a text as it is written: 1,234.5 or 3/4 or -20%."""
    numbers = [match[0] for match in _NUMBER.finditer(text[-_MAX_SEARCHED:])]
    return numbers[-1].rstrip(",") if numbers else None


def has_layout(text: str, tags: Sequence[str] = ("think", "answer")) -> bool:
    """Return whether the text is only these tags, each opened and closed once, in this order."""
    rest = text.strip()
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        if not rest.startswith(opening) or rest.count(opening) != 1 or rest.count(closing) != 1:
            return False
        inside, _, rest = rest.removeprefix(opening).partition(closing)
        if any(f"<{other}>" in inside or f"</{other}>" in inside for other in tags):
            return False
        rest = rest.strip()
    return not rest


def tag_share(text: str, tags: Sequence[str] = ("think", "answer")) -> float:
    """Return the share of opening and closing tags that occur exactly once in the text."""
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    return sum(text.count(mark) == 1 for mark in marks) / len(marks)


def tagged(text: str, tag: str) -> str | None:
    """Return the content of the last complete <tag>...</tag>, or None if there is none."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    end = text.rfind(closing)
    start = text.rfind(opening, 0, end) if end >= 0 else -1
    return text[start + len(opening) : end].strip() if start >= 0 else None


def _is_prose(line: str) -> bool:
    """Return whether the line has words beside a number, or two words in a row."""
    if "\\" in line:
        return False
    beside_number = re.search(r"[0-9]", line) and re.search(r"[^\W\d_]{4,}(?:[\s,.;:]|$)", line)
    return bool(beside_number or re.search(r"[^\W\d_]{2,}[\s,]+[^\W\d_]{2,}", line))
