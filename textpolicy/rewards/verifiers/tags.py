"""Tags in a completion, such as <think> and <answer>: their order and what they enclose."""

from collections.abc import Sequence


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
