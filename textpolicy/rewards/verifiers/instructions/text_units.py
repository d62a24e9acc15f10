"""Counting in texts: words, sentences, and words in capitals. Every function takes linear time."""

# ruff: noqa: RUF001  Marks of punctuation that look like others are meant.

import re
from itertools import pairwise

# A dot after one of these ends no sentence, and neither does a dot after a single letter.
_ABBREVIATIONS = {
    *("adj", "adv", "al", "approx", "apr", "apt", "aug", "ave", "blvd", "bros", "ca", "capt", "cf"),
    *("co", "col", "corp", "dec", "dept", "dr", "ed", "esp", "est", "etc", "feb", "fig", "ft"),
    *("gen", "gov", "hon", "hr", "inc", "jan", "jr", "jul", "jun", "lt", "ltd", "maj", "messrs"),
    *("mr", "mrs", "ms", "mt", "nov", "oct", "pp", "prof", "rep", "rev", "sen", "sept", "sgt"),
    *("sr", "st", "vol", "vs"),
}
_WORD = re.compile(r"\w+")
# A hyphenated word is one word.
_WHOLE_WORD = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*")
_FULL_WIDTH = "。！？"
_ENDS = f".!?…{_FULL_WIDTH}"
_OPENING, _CLOSING = "\"'“‘([{*_«", "\"'”’)]}*_»"


def count_words(text: str) -> int:
    """Return the number of runs of letters, digits and underscores."""
    return sum(1 for _ in _WORD.finditer(text))


def count_capital_words(text: str) -> int:
    """Return the number of words whose letters are all capitals; a hyphen divides no word."""
    return sum(1 for match in _WHOLE_WORD.finditer(text) if match.group().isupper())


def count_sentences(text: str) -> int:
    """Return the number of sentences.

    A sentence ends at . ! ? and their like before a space, also with closing quotes between. A dot
    ends none after an abbreviation, an initial or the number of an entry in a list, nor before a
    small letter. A last part without an end is a sentence too. Line breaks end none.
    """
    tokens = re.sub(rf"([{_FULL_WIDTH}])", r"\1 ", text).split()
    count, is_open = 0, False
    for token, following in pairwise([*tokens, ""]):
        begins, is_open = not is_open, is_open or any(map(str.isalnum, token))
        if is_open and not token[-1].isalnum() and _ends_sentence(token, following, begins=begins):
            count, is_open = count + 1, False
    return count + is_open


def _ends_sentence(token: str, following: str, *, begins: bool) -> bool:
    bare = token.rstrip(_CLOSING)
    if bare[-1:] not in _ENDS or not bare:
        return False
    if not bare.endswith(".") or not following:
        return True
    if following.lstrip(_OPENING)[:1].islower():
        return False
    word = bare.rstrip(".").lstrip(_OPENING).lower()
    letters = all(len(part) == 1 and part.isalpha() and part != "i" for part in word.split("."))
    return not (letters or word in _ABBREVIATIONS or (begins and word.isdecimal()))
