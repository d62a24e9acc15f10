"""The 25 instructions of IFEval: what each needs, and whether a text follows it.

Names and meanings are those of the public data set. Keywords are texts and no patterns.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from textpolicy.rewards.verifiers.instructions.language import KNOWN, language_of
from textpolicy.rewards.verifiers.instructions.text_units import (
    count_capital_words,
    count_sentences,
    count_words,
)
from textpolicy.untrusted.parsing import parse_json

_RELATIONS = ("less than", "at least")
_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_MOST = 10**9
_LONGEST_ARGUMENT = 100_000
_MOST_ARGUMENTS = 1000
Arguments = Mapping[str, Any]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value.strip()) <= _LONGEST_ARGUMENT


def _is_texts(value: Any) -> bool:
    return (
        isinstance(value, list) and 0 < len(value) <= _MOST_ARGUMENTS and all(map(_is_text, value))
    )


# What an argument may be, and the words for it.
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "count": (_is_count, "a whole number, 0 or more"),
    "relation": (lambda value: value in _RELATIONS, f"one of {', '.join(_RELATIONS)}"),
    "text": (_is_text, "a text"),
    "texts": (_is_texts, "a list of texts"),
    "letter": (lambda value: _is_text(value) and len(value.strip()) == 1, "one character"),
    "language": (lambda value: value in KNOWN, f"one of {', '.join(sorted(KNOWN))}"),
}


@dataclass(frozen=True, kw_only=True)
class Checker:
    """`follows` tells whether a text follows the instruction; `needs` are its arguments by kind."""

    follows: Callable[[str, Arguments], bool]
    needs: Mapping[str, str]


CHECKERS: dict[str, Checker] = {}
"""All checkers by the id of their instruction."""


def _checks(id: str, **needs: str) -> Callable[[Callable[[str, Arguments], bool]], None]:
    def add(follows: Callable[[str, Arguments], bool]) -> None:
        CHECKERS[id] = Checker(follows=follows, needs=needs)

    return add


def _compare(count: int, relation: str, number: int) -> bool:
    return count < number if relation == "less than" else count >= number


@_checks("keywords:existence", keywords="texts")
def _keywords_exist(text: str, given: Arguments) -> bool:
    return all(keyword.lower() in text.lower() for keyword in given["keywords"])


@_checks("keywords:frequency", keyword="text", frequency="count", relation="relation")
def _keyword_frequency(text: str, given: Arguments) -> bool:
    count = text.lower().count(given["keyword"].strip().lower())
    return _compare(count, given["relation"], given["frequency"])


@_checks("keywords:forbidden_words", forbidden_words="texts")
def _forbidden_words(text: str, given: Arguments) -> bool:
    words = "|".join(re.escape(word) for word in given["forbidden_words"])
    return not re.search(rf"\b(?:{words})\b", text, re.IGNORECASE)


@_checks(
    "keywords:letter_frequency", letter="letter", let_frequency="count", let_relation="relation"
)
def _letter_frequency(text: str, given: Arguments) -> bool:
    count = text.lower().count(given["letter"].strip().lower())
    return _compare(count, given["let_relation"], given["let_frequency"])


@_checks("language:response_language", language="language")
def _response_language(text: str, given: Arguments) -> bool:
    return language_of(text) == given["language"] or not any(map(str.isalpha, text))


@_checks("length_constraints:number_sentences", num_sentences="count", relation="relation")
def _number_sentences(text: str, given: Arguments) -> bool:
    return _compare(count_sentences(text), given["relation"], given["num_sentences"])


@_checks("length_constraints:number_words", num_words="count", relation="relation")
def _number_words(text: str, given: Arguments) -> bool:
    return _compare(count_words(text), given["relation"], given["num_words"])


@_checks("length_constraints:number_paragraphs", num_paragraphs="count")
def _number_paragraphs(text: str, given: Arguments) -> bool:
    """Paragraphs are divided by ***. An empty one between two others is wrong."""
    first, *middle = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    last = [middle.pop()] if middle else []
    present = [part for part in (first, *last) if part]
    return all(middle) and len(middle) + len(present) == given["num_paragraphs"]


@_checks(
    "length_constraints:nth_paragraph_first_word",
    num_paragraphs="count",
    nth_paragraph="count",
    first_word="text",
)
def _first_word_of_paragraph(text: str, given: Arguments) -> bool:
    """Paragraphs are divided by two line breaks."""
    paragraphs = [part.strip() for part in text.split("\n\n")]
    count, place = sum(map(bool, paragraphs)), given["nth_paragraph"]
    if not 0 < place <= count == given["num_paragraphs"] or not paragraphs[place - 1]:
        return False
    word = paragraphs[place - 1].split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word, maxsplit=1)[0].lower() == given["first_word"].lower()


@_checks("detectable_content:number_placeholders", num_placeholders="count")
def _number_placeholders(text: str, given: Arguments) -> bool:
    return sum(map(_count_brackets, text.split("\n"))) >= given["num_placeholders"]


def _count_brackets(line: str) -> int:
    count = start = 0
    # A regular expression would look for the end of the line at each bracket.
    while (start := line.find("[", start)) >= 0 and (start := line.find("]", start)) >= 0:
        count += 1
    return count


@_checks("detectable_content:postscript", postscript_marker="text")
def _postscript(text: str, given: Arguments) -> bool:
    marker: str = given["postscript_marker"].strip()
    spaced = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    pattern = spaced.get(marker) or re.escape(marker.lower())
    return bool(re.search(pattern, text.lower()))


@_checks("detectable_format:number_bullet_lists", num_bullets="count")
def _number_bullets(text: str, given: Arguments) -> bool:
    lines = [line.strip() for line in text.split("\n")]
    stars = [line for line in lines if line[:1] == "*" and line[1:2] not in ("*", "")]
    return len(stars) + sum(line.startswith("-") for line in lines) == given["num_bullets"]


@_checks("detectable_format:constrained_response")
def _constrained_response(text: str, given: Arguments) -> bool:
    return any(option in text for option in _OPTIONS)


@_checks("detectable_format:number_highlighted_sections", num_highlights="count")
def _highlighted_sections(text: str, given: Arguments) -> bool:
    single = re.findall(r"\*([^\n*]*)\*", text)
    double = re.findall(r"\*\*([^\n*]*)\*\*", text)
    return sum(1 for part in single + double if part.strip()) >= given["num_highlights"]


@_checks("detectable_format:multiple_sections", section_spliter="text", num_sections="count")
def _multiple_sections(text: str, given: Arguments) -> bool:
    heads = re.findall(re.escape(given["section_spliter"].strip()) + r"\s?\d+", text)
    return len(heads) >= given["num_sections"]


@_checks("detectable_format:json_format")
def _json_format(text: str, given: Arguments) -> bool:
    text = re.sub(r"^```(?:json|Json|JSON)?", "", text.strip()).removesuffix("```").strip()
    try:
        parse_json(text, constants=True)
    except ValueError:
        return False
    return True


@_checks("detectable_format:title")
def _title(text: str, given: Arguments) -> bool:
    return any(map(_has_title, text.split("\n")))


def _has_title(line: str) -> bool:
    start, end = line.find("<<"), line.rfind(">>")
    return 0 <= start < end - 2 and bool(line[start:end].lstrip("<").rstrip(">").strip())


@_checks("combination:two_responses")
def _two_responses(text: str, given: Arguments) -> bool:
    first, *rest = [part.strip() for part in text.split("******")]
    last = [rest.pop()] if rest else []
    found = [part for part in (first, *rest, *last) if part]
    return all(rest) and len(found) == 2 and found[0] != found[1]


@_checks("combination:repeat_prompt", prompt_to_repeat="text")
def _repeat_prompt(text: str, given: Arguments) -> bool:
    return text.strip().lower().startswith(given["prompt_to_repeat"].strip().lower())


@_checks("startend:end_checker", end_phrase="text")
def _end_phrase(text: str, given: Arguments) -> bool:
    return text.strip().strip('"').lower().endswith(given["end_phrase"].strip().lower())


@_checks("startend:quotation")
def _quotation(text: str, given: Arguments) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


@_checks(
    "change_case:capital_word_frequency", capital_frequency="count", capital_relation="relation"
)
def _capital_words(text: str, given: Arguments) -> bool:
    count = count_capital_words(text)
    return _compare(count, given["capital_relation"], given["capital_frequency"])


@_checks("change_case:english_capital")
def _english_capital(text: str, given: Arguments) -> bool:
    return text.isupper() and language_of(text) in ("en", None)


@_checks("change_case:english_lowercase")
def _english_lowercase(text: str, given: Arguments) -> bool:
    return text.islower() and language_of(text) in ("en", None)


@_checks("punctuation:no_comma")
def _no_comma(text: str, given: Arguments) -> bool:
    return "," not in text
