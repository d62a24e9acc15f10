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
    OperationNode,
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
_SUM = re.compile(r"(?<=[^\s+$])\s*\+")
_PRODUCT = re.compile(r"[*(\u00b7\u00d7]|\\times|\\cdot")


def math_equal(completion: str, answer: object) -> bool:
    """Return whether the final answer of `completion` has the value of `answer`, a text or number.

    A percent sign divides by 100. Two units must be equal, but one answer may have none. A list
    without brackets is a set. An expression equals its value, so on tasks of arithmetic a copy of
    the question, such as 341+980, is right too: use `number_equal` there.
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
    """Return whether the number in `completion` is within a relative `tolerance` of `answer`.

    `number_in` says what is a number: 1321 is one, and 341+980 is none.
    """
    try:
        given, wanted = number_in(completion), _value_of(parse_answer(str(answer)))
    except UnreadableAnswerError:
        return False
    if given is None or wanted is None:
        return False
    return abs(given - wanted) <= Fraction(tolerance) * abs(wanted)


def number_in(text: str) -> Fraction | None:
    """Return the exact value of a text's final answer, else of its last number, else None.

    A number is an integer, a decimal, a fraction such as 2/3, a mixed number, a percentage or
    1.5*10^6, with or without a unit. A final answer that is left to calculate is no number: a sum,
    a difference, a product, a power, a root, or a division without remainder, such as 48/6.
    """
    for answer in (final_answer(text), last_number(text)):
        try:
            tree = parse_answer(answer) if answer is not None else None
            value = _value_of(tree) if tree is not None else None
        except UnreadableAnswerError:
            continue
        if answer is not None and tree is not None and value is not None:
            return value if _is_written_out(tree, value, answer) else None
    return None


def _value_of(tree: AnswerTree) -> Fraction | None:
    if isinstance(tree, RelationNode):
        tree = named_value(tree, any_label=True) or tree
    return exact_value(tree.value if isinstance(tree, MeasureNode) else tree)


def _is_written_out(tree: AnswerTree, value: Fraction, text: str) -> bool:
    """Return whether the answer, or one side of an equation, writes the value as a number."""
    sides = tree.sides if isinstance(tree, RelationNode) else (tree,)
    return any(_is_number(side, text) and _value_of(side) == value for side in sides)


def _is_number(tree: AnswerTree, text: str) -> bool:
    """Return whether the tree is a number. Only `text` tells a mixed number from a sum."""
    if isinstance(tree, MeasureNode):
        return _is_number(tree.value, text)
    if not isinstance(tree, OperationNode):
        return isinstance(tree, Fraction)
    if len(tree.operands) != 2:
        return False
    left, right = tree.operands
    if tree.operator == "-":
        return left == Fraction(0) and _is_number(right, text)
    if tree.operator == "+":
        return not _SUM.search(text) and _is_number(left, text) and isinstance(right, OperationNode)
    if tree.operator == "*":
        return _is_number(left, text) and _is_scale(right, exact_value(left), text)
    if tree.operator == "/" and right == Fraction(100) and "%" in text:
        return _is_number(left, text)
    whole = all(_is_number(part, text) and _is_whole(part) for part in (left, right))
    return tree.operator == "/" and whole and not _is_whole(tree)


def _is_scale(tree: AnswerTree, factor: Fraction | None, text: str) -> bool:
    """Return whether a factor in front of the tree makes 1.5*10^6, 1.5 million or 30 minutes."""
    if isinstance(tree, Fraction):
        return not _PRODUCT.search(text)
    if not isinstance(tree, OperationNode) or tree.operator != "^":
        return False
    return tree.operands[0] == Fraction(10) and 1 <= abs(factor or 0) < 10


def _is_whole(tree: AnswerTree) -> bool:
    value = exact_value(tree)
    return value is not None and value.denominator == 1


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
