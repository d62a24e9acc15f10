"""Text against text: equal, equal but for form, one of some choices, the same items, how long."""

import re
import unicodedata
from collections.abc import Hashable, Sequence

_LONGEST = 10_000


def exact_match(completion: str, answer: object) -> bool:
    """Whether they are equal but for space at the ends."""
    return completion.strip() == str(answer).strip()


def normalised_match(completion: str, answer: object) -> bool:
    """Whether they are equal but for case, spacing, width, and punctuation at the ends."""
    return normalised(completion) == normalised(str(answer))


def normalised(text: str) -> str:
    """The text as `normalised_match` compares it. What is all punctuation stays as it is."""
    return _without_edges(_plain(text))


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text[:_LONGEST]).casefold()


def _without_edges(text: str) -> str:
    """Single spaces, and no punctuation at the ends.

    Not by a regular expression: one that looks for the end of the text is quadratic here.
    """
    text = " ".join(text.split())
    if text[:1].isalnum() and text[-1:].isalnum():
        return text
    start = next((place for place, char in enumerate(text) if char.isalnum()), 0)
    end = next((place for place in range(len(text), 0, -1) if text[place - 1].isalnum()), len(text))
    return text[start:end]


def choice_match(completion: str, answer: str, *, choices: str = "ABCDE") -> bool:
    """Whether the last of the choices that stands alone in the text, as in "(B)", is `answer`."""
    return choice_in(completion, choices=choices) == answer.strip().strip("().").upper()


def choice_in(text: str, *, choices: str = "ABCDE") -> str | None:
    """The last letter of `choices` that stands alone in the text; None without one."""
    capital, either = re.escape(choices.upper()), re.escape(choices.upper() + choices.lower())
    # A small letter counts only where it is marked as a choice: "a" is a word.
    alone = re.compile(rf"(?<!\w)(?:\(([{either}])\)|([{capital}])(?!['\u2019\w]))")
    found = [match[1] or match[2] for match in alone.finditer(text[-_LONGEST:])]
    if not found and len(text.strip().strip("().")) == 1:
        found = [letter for letter in text.strip().strip("().") if letter.upper() in choices]
    return found[-1].upper() if found else None


def set_match(completion: str, answer: str | Sequence[object], *, separator: str = ",") -> bool:
    """Whether both list the same items, in any order, each compared as `normalised_match` does."""
    return items_in(completion, separator) == items_in(answer, separator)


def set_overlap(completion: str, answer: str | Sequence[object], *, separator: str = ",") -> float:
    """Shared items over all items of both: 1 for the same set, 0 for nothing in common."""
    given, wanted = items_in(completion, separator), items_in(answer, separator)
    return len(given & wanted) / len(given | wanted) if given | wanted else 1.0


def items_in(text: str | Sequence[object], separator: str = ",") -> set[str]:
    """The different items of a list, normalised; empty ones are none."""
    if isinstance(text, str):
        items = map(_without_edges, _plain(text).split(separator))
    else:
        items = (normalised(str(item)) for item in text)
    return {item for item in items if item}


def length_score(text: str, low: int, high: int) -> float:
    """1 from `low` to `high` characters, falling to 0 at none and at twice `high`."""
    size = len(text)
    if size < low:
        return size / low
    return 1.0 if size <= high else max(0.0, 2 - size / high)


def overlong_penalty(tokens: Sequence[int], limit: int, margin: int) -> float:
    """0 up to `limit - margin` tokens, then falling in a line to -1 at `limit` (DAPO, eq. 13)."""
    over = len(tokens) - (limit - margin)
    return -min(1.0, max(0.0, over / margin))


def repetition(sequence: Sequence[Hashable], *, size: int = 16) -> float:
    """The share of runs of `size` that occurred before: near 0 in prose, near 1 in a loop.

    A string is taken by its characters and needs no word boundaries, so any language will do; pass
    token ids with a `size` of about 6.
    """
    sequence = sequence[:_LONGEST]
    places = range(len(sequence) - size + 1)
    runs = [sequence[place : place + size] for place in places]
    if not isinstance(sequence, str):
        runs = [tuple(run) for run in runs]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
