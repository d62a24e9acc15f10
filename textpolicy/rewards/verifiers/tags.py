"""The form of an answer, whatever it says: tags, in order, once each."""

from collections.abc import Sequence


def has_layout(text: str, tags: Sequence[str] = ("think", "answer")) -> bool:
    """Whether the text is nothing but these tags, each opened and closed once, in this order."""
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
    """Which part of the opening and closing tags the text has exactly once: a first foothold."""
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    return sum(text.count(mark) == 1 for mark in marks) / len(marks)
