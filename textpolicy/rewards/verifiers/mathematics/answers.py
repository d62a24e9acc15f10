"""Compare mathematical answers in texts.

`grammar.py` reads both answers and `comparison.py` compares their values. Text that is not
mathematics is compared as text.
"""

import re
from fractions import Fraction

from textpolicy.rewards.verifiers.answer_in_text import final_answer, last_number
from textpolicy.rewards.verifiers.mathematics.answer_tree import (
    AnswerTree,
    MeasureNode,
    RelationNode,
)
from textpolicy.rewards.verifiers.mathematics.comparison import named_value, same_answer
from textpolicy.rewards.verifiers.mathematics.grammar import parse_answer
from textpolicy.rewards.verifiers.mathematics.tokens import UnreadableAnswerError
from textpolicy.rewards.verifiers.mathematics.values import exact_value
from textpolicy.rewards.verifiers.text_answers import normalise_text

_MAX_TEXT = 1_000
_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|mbox|textbf|textit|textrm|mathbf)\s*\{([^{}]*)\}")
_LETTER_UNIT = re.compile(r"[0-9] ?[mgshL](?![a-zA-Z])")
_CHOICE = re.compile(r"(?:[Oo]ption |[Cc]hoice )?\(?([A-Z])(?:\)(| .*)|[.:]?)")
_SECOND_CHOICE = re.compile(r"\b[A-Z]\)|\b(?:and|or)\b")


def math_equal(completion: str, answer: object) -> bool:
    """Return whether the final answer of `completion` has the value of `answer`, a text or number.

    A percent sign divides by 100. Two units must be equal, but one answer may have none. A list
    without brackets is a set.
    """
    given, wanted = final_answer(completion), str(answer)
    if given is None:
        return False
    if len(wanted) > 1 and (boxed := final_answer(wanted, tags=(), number=False)):
        wanted = boxed
    if (choice := _choice_in(wanted)) and _choice_in(given) == choice:
        return True
    try:
        right = parse_answer(wanted)
    except UnreadableAnswerError:
        return _same_text(given, wanted)
    if _is_same(given, right):
        return True
    if not (_LETTER_UNIT.search(given) or _LETTER_UNIT.search(wanted)):
        return False
    return _is_same(given, _parse_with_letters(wanted), letters=True)


def number_equal(completion: str, answer: float | str, *, tolerance: float = 0.0) -> bool:
    """Return whether the number in `completion` is within a relative `tolerance` of `answer`."""
    try:
        given, wanted = number_in(completion), _number_of(str(answer))
    except UnreadableAnswerError:
        return False
    if given is None or wanted is None:
        return False
    return abs(given - wanted) <= Fraction(tolerance) * abs(wanted)


def number_in(text: str) -> Fraction | None:
    """Return the exact value of a text's final answer, else of its last number, else None."""
    for answer in (final_answer(text), last_number(text)):
        try:
            value = _number_of(answer) if answer is not None else None
        except UnreadableAnswerError:
            continue
        if value is not None:
            return value
    return None


def _number_of(text: str) -> Fraction | None:
    tree = parse_answer(text)
    if isinstance(tree, RelationNode):
        tree = named_value(tree, any_label=True) or tree
    return exact_value(tree.value if isinstance(tree, MeasureNode) else tree)


def _is_same(given: str, right: AnswerTree, *, letters: bool = False) -> bool:
    try:
        return same_answer(_parse_with_letters(given) if letters else parse_answer(given), right)
    except UnreadableAnswerError:
        return False


def _parse_with_letters(text: str) -> AnswerTree:
    """Return the tree with letters as units, or without if the text cannot be read so."""
    try:
        return parse_answer(text, letters_are_units=True)
    except UnreadableAnswerError:
        return parse_answer(text)


def _choice_in(text: str) -> str | None:
    """Return the letter of a choice: B, (B), B. or (B) with the choice behind it."""
    plain = _TEXT_COMMAND.sub(r"\1", text[:_MAX_TEXT]).replace("\\ ", " ")
    match = _CHOICE.fullmatch(" ".join(plain.split()))
    return match[1] if match and not _SECOND_CHOICE.search(match[2] or "") else None


def _same_text(given: str, wanted: str) -> bool:
    """Return whether two texts are equal, apart from case and spaces if they are words."""
    if max(len(given), len(wanted)) > _MAX_TEXT:
        return given.strip() == wanted.strip()
    given, wanted = (_TEXT_COMMAND.sub(r"\1", text) for text in (given, wanted))
    given, wanted = given.strip(" $."), wanted.strip(" $.")
    if not re.search(r"[\\{}=<>^+*/|\[\]-]", given + wanted):
        return bool(wanted) and normalise_text(given) == normalise_text(wanted)
    return _plain_latex(given) == _plain_latex(wanted)


def _plain_latex(text: str) -> str:
    """Return LaTeX without spaces, sizes of brackets, and braces around one character."""
    text = re.sub(r"\\[,!;: ]|\\left|\\right|(?<=\\)[dt](?=frac)|\s", "", text)
    return re.sub(r"\{([0-9a-zA-Z])\}", r"\1", text)
