"""Compare sets of real numbers: intervals, inequalities, unions, and what is left out of them.

The ends of all intervals cut the line into points and gaps. A set is the points and gaps that it
holds, as the bits of a whole number, and two sets are equal if they hold the same ones.
"""

from collections.abc import Iterator
from decimal import localcontext
from fractions import Fraction
from functools import cmp_to_key

from textpolicy.rewards.verifiers.mathematics.answer_tree import (
    AnswerTree,
    ListNode,
    LiteralNode,
    OperationNode,
    RelationNode,
    operation,
    parts_of,
)
from textpolicy.rewards.verifiers.mathematics.precision import (
    Number,
    as_ball,
    decimal_context,
    is_certainly_different,
)
from textpolicy.rewards.verifiers.mathematics.tokens import UnreadableAnswerError
from textpolicy.rewards.verifiers.mathematics.values import real_value, variables_in

_ORDERS = {"<", "<=", ">", ">=", "!="}
_MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "!=": "!="}
_SET_OPERATORS = {"cup", "cap", "setminus"}
_INTERVALS = {"()", "[)", "(]", "[]"}
_MINUS_INFINITY = operation("-", Fraction(0), "infinity")
_INFINITE: tuple[AnswerTree, ...] = ("infinity", _MINUS_INFINITY)
_REALS = LiteralNode("set R")
_DIGITS = 150


def is_set(tree: AnswerTree) -> bool:
    """Return whether the tree can only be a set of numbers: an inequality, a union, the reals."""
    if isinstance(tree, RelationNode):
        return set(tree.relations) <= _ORDERS or tree.relations == ("in",)
    operator = tree.operator if isinstance(tree, OperationNode) else ""
    has_end = isinstance(tree, ListNode) and any(item in _INFINITE for item in tree.items)
    return operator in _SET_OPERATORS or has_end or tree in (_REALS, "emptyset")


def same_set(left: AnswerTree, right: AnswerTree) -> bool:
    """Return whether two sets of real numbers are equal, or raise `UnreadableAnswerError`."""
    names = _names(left), _names(right)
    if max(map(len, names)) > 1:
        raise UnreadableAnswerError("an inequality has several variables")
    if len(names[0] | names[1]) > 1:
        return False
    with localcontext(decimal_context(_DIGITS)):
        ends = _Ends([*_numbers(left), *_numbers(right)])
        return ends.bits_of(left) == ends.bits_of(right)


def _names(tree: AnswerTree) -> frozenset[str]:
    """Return the variables that inequalities are about."""
    if isinstance(tree, RelationNode):
        return variables_in(tree)
    return frozenset[str]().union(*map(_names, parts_of(tree)))


def _numbers(tree: AnswerTree) -> Iterator[Number]:
    """Yield the numbers at which the set may begin or end."""
    inner = isinstance(tree, ListNode | RelationNode)
    if inner or (isinstance(tree, OperationNode) and tree.operator in _SET_OPERATORS):
        for part in parts_of(tree):
            yield from _numbers(part)
    elif tree not in (*_INFINITE, _REALS, "emptyset") and not variables_in(tree):
        yield real_value(tree)


def _order(left: Number, right: Number) -> int:
    """Return -1, 0 or 1. Numbers that 150 digits cannot tell apart are equal."""
    if not is_certainly_different(left, right):
        return 0
    return -1 if as_ball(left).re < as_ball(right).re else 1


class _Ends:
    """The numbers that cut the line. Bit 2k + 1 is the point k, bit 2k the gap in front of it."""

    def __init__(self, numbers: list[Number]) -> None:
        self._ends: list[Number] = []
        for number in sorted(numbers, key=cmp_to_key(_order)):
            if not self._ends or _order(self._ends[-1], number):
                self._ends.append(number)
        self._all = (1 << (2 * len(self._ends) + 1)) - 1

    def bits_of(self, tree: AnswerTree) -> int:
        """Return the points and gaps that the set holds."""
        if tree == _REALS:
            return self._all
        if tree == "emptyset":
            return 0
        if isinstance(tree, RelationNode):
            return self._relation(tree)
        if isinstance(tree, ListNode):
            return self._list(tree)
        if isinstance(tree, OperationNode) and tree.operator in _SET_OPERATORS:
            left, right = map(self.bits_of, tree.operands[:2])
            for rest in tree.operands[2:]:
                right = self._joined(tree.operator, right, self.bits_of(rest))
            return self._joined(tree.operator, left, right)
        return self._compared(tree, "=")

    def _joined(self, operator: str, left: int, right: int) -> int:
        if operator == "cup":
            return left | right
        return left & (right if operator == "cap" else ~right)

    def _list(self, tree: ListNode) -> int:
        if tree.brackets == "{}":
            bits = 0
            for item in tree.items:
                bits |= self._compared(item, "=")
            return bits
        if tree.brackets not in _INTERVALS or len(tree.items) != 2:
            raise UnreadableAnswerError("expected a set of numbers")
        low, high = tree.items
        if (low in _INFINITE and tree.brackets[0] == "[") or (
            high in _INFINITE and tree.brackets[1] == "]"
        ):
            raise UnreadableAnswerError("an interval holds no infinite number")
        above = self._compared(low, ">=" if tree.brackets[0] == "[" else ">")
        below = self._compared(high, "<=" if tree.brackets[1] == "]" else "<")
        if not above & below:
            raise UnreadableAnswerError("the ends of an interval are in the wrong order")
        return above & below

    def _relation(self, tree: RelationNode) -> int:
        bits = self._all
        for left, relation, right in zip(tree.sides, tree.relations, tree.sides[1:], strict=False):
            if not isinstance(left, str):
                left, relation, right = right, _MIRRORED.get(relation, relation), left
            if variables_in(left) != frozenset((str(left),)) or variables_in(right):
                raise UnreadableAnswerError("an inequality is not solved")
            bits &= self.bits_of(right) if relation == "in" else self._compared(right, relation)
        return bits

    def _compared(self, end: AnswerTree, relation: str) -> int:
        """Return what stands in this relation to a number."""
        if end in _INFINITE and relation in ("=", "!="):
            raise UnreadableAnswerError("infinity is no number")
        if end in _INFINITE:
            return self._all if (end == "infinity") == (relation in ("<", "<=")) else 0
        number = real_value(end)
        place = next(place for place, each in enumerate(self._ends) if not _order(each, number))
        point = 1 << (2 * place + 1)
        below = point - 1
        parts = {"<": below, ">": self._all & ~(below | point), "=": point}
        if relation == "!=":
            return self._all & ~point
        bits = parts[relation[0]]
        return bits | point if len(relation) == 2 else bits
