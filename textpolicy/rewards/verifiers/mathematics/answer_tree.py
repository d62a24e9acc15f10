"""The trees of mathematical answers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from textpolicy.rewards.verifiers.mathematics.tokens import UnreadableAnswerError
from textpolicy.rewards.verifiers.mathematics.units import Unit

_MAX_HEIGHT = 64  # operations on top of each other
MAX_ITEMS = 24
"""The most items in a list."""


@dataclass(frozen=True, slots=True)
class OperationNode:
    """An operator or function with its operands."""

    operator: str
    operands: "tuple[AnswerTree, ...]"
    height: int


@dataclass(frozen=True, slots=True)
class ListNode:
    """Items in brackets: "{}" (or no brackets) is a set; the order counts in other brackets.

    The brackets "matrix" hold rows, "row" the items of one, and ":" a ratio.
    """

    brackets: str
    items: "tuple[AnswerTree, ...]"
    height: int


@dataclass(frozen=True, slots=True)
class MeasureNode:
    """A value with a unit. `certain` is False if the unit may also be a variable, as in 5m."""

    value: "AnswerTree"
    unit: Unit
    certain: bool
    height: int


@dataclass(frozen=True, slots=True)
class RelationNode:
    """Sides with relations between them: `a < x <= b` has three sides and two relations.

    `label` is the text of a first side that only names the second: the AB of `AB = 5`.
    """

    sides: "tuple[AnswerTree, ...]"
    relations: tuple[str, ...]
    label: str
    height: int


@dataclass(frozen=True, slots=True)
class LiteralNode:
    """What is compared as it is written: a number of base 2, a time of day, words."""

    text: str


AnswerTree = Fraction | str | OperationNode | ListNode | MeasureNode | RelationNode | LiteralNode
"""A number, the name of a variable or constant, or a node above other trees."""


def operation(operator: str, *operands: AnswerTree) -> OperationNode:
    """Return the node of an operation."""
    return OperationNode(operator, operands, height_over(operands))


def list_of(brackets: str, items: Iterable[AnswerTree]) -> ListNode:
    """Return the node of a list."""
    items = tuple(items)
    if len(items) > MAX_ITEMS:
        raise UnreadableAnswerError(f"more than {MAX_ITEMS} items")
    return ListNode(brackets, items, height_over(items))


def parts_of(tree: AnswerTree) -> tuple[AnswerTree, ...]:
    """Return the trees directly below a node."""
    if isinstance(tree, OperationNode):
        return tree.operands
    if isinstance(tree, ListNode):
        return tree.items
    if isinstance(tree, MeasureNode):
        return (tree.value,)
    return tree.sides if isinstance(tree, RelationNode) else ()


def height_over(trees: Sequence[AnswerTree]) -> int:
    """Return the height of a node above these trees; recursion over a tree needs a bound on it."""
    low = (Fraction, str, LiteralNode)
    height = 1 + max((0 if isinstance(tree, low) else tree.height for tree in trees), default=0)
    if height > _MAX_HEIGHT:
        raise UnreadableAnswerError(f"more than {_MAX_HEIGHT} operations on top of each other")
    return height


def with_both_signs(tree: AnswerTree) -> list[AnswerTree]:
    """Return the two trees that "plus or minus" stands for, or the tree itself."""
    if not _has_sign_choice(tree):
        return [tree]
    return [_with_sign(tree, "+-"), _with_sign(tree, "-+")]


def _has_sign_choice(tree: AnswerTree) -> bool:
    chosen = isinstance(tree, OperationNode) and tree.operator in ("+-", "-+")
    return chosen or any(map(_has_sign_choice, parts_of(tree)))


def _with_sign(tree: AnswerTree, positive: str) -> AnswerTree:
    """Return the tree with a plus for `positive` and a minus for its opposite."""
    if isinstance(tree, OperationNode):
        operands = tuple(_with_sign(operand, positive) for operand in tree.operands)
        operator = tree.operator
        if operator in ("+-", "-+"):
            operator = "+" if operator == positive else "-"
        return OperationNode(operator, operands, tree.height)
    if isinstance(tree, ListNode):
        return list_of(tree.brackets, (_with_sign(item, positive) for item in tree.items))
    if isinstance(tree, MeasureNode):
        value = _with_sign(tree.value, positive)
        return MeasureNode(value, tree.unit, tree.certain, tree.height)
    if isinstance(tree, RelationNode):
        sides = tuple(_with_sign(side, positive) for side in tree.sides)
        return RelationNode(sides, tree.relations, tree.label, tree.height)
    return tree
