"""Compare texts: equality, patterns, choices, sets of items. Also their length and repetition."""

import re
import unicodedata
from collections.abc import Hashable, Sequence
from functools import cache

from textpolicy.errors import ConfigError
from textpolicy.rewards.call_reward import RewardResult
from textpolicy.rewards.reward_function import Reward, Sample
from textpolicy.rewards.weighted_rewards import Rewards
from textpolicy.rewards.worker_process import WorkerPool

_MAX_COMPARED = 10_000


def exact_match(completion: str, answer: object) -> bool:
    """Return whether the two are equal apart from space at the ends."""
    return completion.strip() == str(answer).strip()


def normalised_match(completion: str, answer: object) -> bool:
    """Return whether the two are equal apart from case, spacing, width and outer punctuation."""
    return normalise_text(completion) == normalise_text(str(answer))


def normalise_text(text: str) -> str:
    """Return the text that `normalised_match` compares. Punctuation alone stays as it is."""
    return _trim(_fold(text))


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKC", text[:_MAX_COMPARED]).casefold()


def _trim(text: str) -> str:
    """Return the text with single spaces and without punctuation at the ends."""
    # A regular expression that searches for the end of the text would take quadratic time.
    text = " ".join(text.split())
    if text[:1].isalnum() and text[-1:].isalnum():
        return text
    start = next((place for place, char in enumerate(text) if char.isalnum()), 0)
    end = next((place for place in range(len(text), 0, -1) if text[place - 1].isalnum()), len(text))
    return text[start:end]


def choice_match(completion: str, answer: str, *, choices: str = "ABCDE") -> bool:
    """Return whether `choice_in` finds the letter `answer`, which may be written as "(B)"."""
    return choice_in(completion, choices=choices) == answer.strip().strip("().").upper()


def choice_in(text: str, *, choices: str = "ABCDE") -> str | None:
    """Return the last letter of `choices` that stands alone in the text, or None."""
    capital, either = re.escape(choices.upper()), re.escape(choices.upper() + choices.lower())
    # A small letter counts only inside brackets, because "a" is a word.
    alone = re.compile(rf"(?<!\w)(?:\(([{either}])\)|([{capital}])(?!['\u2019\w]))")
    letters = [match[1] or match[2] for match in alone.finditer(text[-_MAX_COMPARED:])]
    if not letters and len(text.strip().strip("().")) == 1:
        letters = [letter for letter in text.strip().strip("().") if letter.upper() in choices]
    return letters[-1].upper() if letters else None


def set_match(completion: str, answer: str | Sequence[object], *, separator: str = ",") -> bool:
    """Return whether both list the same items in any order; items compare as `normalised_match`."""
    return _items_in(completion, separator) == _items_in(answer, separator)


def set_overlap(completion: str, answer: str | Sequence[object], *, separator: str = ",") -> float:
    """Return the shared items over all items of both: 1 for equal sets, 0 if nothing is shared."""
    given, wanted = _items_in(completion, separator), _items_in(answer, separator)
    return len(given & wanted) / len(given | wanted) if given | wanted else 1.0


def _items_in(text: str | Sequence[object], separator: str) -> set[str]:
    """Return the normalised items of a list, without empty ones."""
    if isinstance(text, str):
        items = map(_trim, _fold(text).split(separator))
    else:
        items = (normalise_text(str(item)) for item in text)
    return {item for item in items if item}


def length_score(text: str, low: int, high: int) -> float:
    """Return 1 from `low` to `high` characters, falling to 0 at no text and at twice `high`."""
    size = len(text)
    if size < low:
        return size / low
    return 1.0 if size <= high else max(0.0, 2 - size / high)


def overlong_penalty(tokens: Sequence[int], limit: int, margin: int) -> float:
    """Return 0 up to `limit - margin` tokens, falling linearly to -1 at `limit` (DAPO, eq. 13)."""
    over = len(tokens) - (limit - margin)
    return -min(1.0, max(0.0, over / margin))


def repetition(sequence: Sequence[Hashable], *, size: int = 16) -> float:
    """Return the share of runs of `size` elements that occurred before.

    The share is near 0 in prose and near 1 in a loop. The elements of a string are its characters,
    so the language does not matter. For token ids, use a `size` of about 6.
    """
    sequence = sequence[:_MAX_COMPARED]
    places = range(len(sequence) - size + 1)
    runs = [sequence[place : place + size] for place in places]
    if not isinstance(sequence, str):
        runs = [tuple(run) for run in runs]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def pattern_match(text: str, pattern: str, *, whole: bool = False, seconds: float = 0.5) -> bool:
    """Return whether the pattern matches part of the text, or with `whole` all, in `seconds`.

    The pattern runs in a process that is killed when the time is up: Python's engine takes
    exponential time for some patterns and cannot be interrupted.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{pattern!r} is no regular expression: {error}") from error
    results: list[RewardResult] = []
    sample = Sample(prompt="", completion=text, example={"pattern": pattern, "whole": whole})
    _worker_pool(seconds).run(0, [sample], lambda _, result: results.append(result))
    return results[0].value == 1.0


def _matches(completion: str, pattern: str, whole: bool) -> bool:
    """Return whether the pattern matches; this is the function that the process calls."""
    search = re.fullmatch if whole else re.search
    return search(pattern, completion, re.DOTALL) is not None


@cache
def _worker_pool(seconds: float) -> WorkerPool:
    # With two processes, one is ready while the other is replaced.
    pool = WorkerPool(Rewards(Reward(_matches, "pattern_match"), workers=2), timeout=seconds)
    pool.start(2)
    return pool
