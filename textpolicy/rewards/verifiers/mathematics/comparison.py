"""Compare the trees of two mathematical answers by their values."""

import re
from collections.abc import Sequence
from fractions import Fraction

from textpolicy.rewards.verifiers.mathematics.answer_tree import (
    AnswerTree,
    ListNode,
    LiteralNode,
    MeasureNode,
    OperationNode,
    RelationNode,
    list_of,
    operation,
)
from textpolicy.rewards.verifiers.mathematics.sets import is_set, same_set
from textpolicy.rewards.verifiers.mathematics.tokens import UnreadableAnswerError
from textpolicy.rewards.verifiers.mathematics.values import (
    exact_value,
    is_constant_ratio,
    same_number,
    variables_in,
)

_VECTORS = ("()", "⟨⟩")
_MAX_PLACES = 20


def same_answer(given: AnswerTree, wanted: AnswerTree) -> bool:
    """Return whether two trees say the same, or raise `UnreadableAnswerError`."""
    if given == wanted:
        return True
    if isinstance(given, RelationNode) and isinstance(wanted, RelationNode):
        return _same_relations(given, wanted)
    if is_set(given) or is_set(wanted):
        return _same_sets(given, wanted)
    if isinstance(given, RelationNode):
        return _same_named(given, wanted, any_label=True)
    if isinstance(wanted, RelationNode):
        return _same_named(wanted, given, any_label=False)
    if isinstance(given, MeasureNode) or isinstance(wanted, MeasureNode):
        return _same_measure(given, wanted)
    if isinstance(given, ListNode) or isinstance(wanted, ListNode):
        return _same_lists(given, wanted)
    if isinstance(given, LiteralNode) or isinstance(wanted, LiteralNode):
        return _same_literal(given, wanted)
    return same_number(given, wanted)


def _same_sets(given: AnswerTree, wanted: AnswerTree) -> bool:
    """Compare sets of numbers, or intervals with variables by their ends."""
    if _brackets(given) == _brackets(wanted) != "":
        return _same_lists(given, wanted)
    return same_set(given, wanted)


def _brackets(tree: AnswerTree) -> str:
    return tree.brackets if isinstance(tree, ListNode) else ""


def _same_end(given: AnswerTree, wanted: AnswerTree) -> bool:
    if given == wanted:
        return True
    return not (_is_infinite(given) or _is_infinite(wanted)) and same_answer(given, wanted)


def _is_infinite(tree: AnswerTree) -> bool:
    """Return whether the tree holds the sign of infinity."""
    if isinstance(tree, OperationNode):
        return any(map(_is_infinite, tree.operands))
    return tree == "infinity"


def _same_relations(given: RelationNode, wanted: RelationNode) -> bool:
    if is_set(given) and is_set(wanted):
        try:
            return same_set(given, wanted)
        except UnreadableAnswerError:
            pass
    values = named_value(given, any_label=True), named_value(wanted, any_label=True)
    if values[0] is not None and values[1] is not None and _labels_agree(given, wanted):
        return same_answer(values[0], values[1])
    given, wanted = map(_with_less_first, (given, wanted))
    if given.relations != wanted.relations or len(given.sides) != 2:
        return False
    if _is_solved(given) or _is_solved(wanted) or variables_in(given) != variables_in(wanted):
        return False
    if any(isinstance(side, LiteralNode | ListNode) for side in (*given.sides, *wanted.sides)):
        return False
    left, right = (operation("-", *relation.sides) for relation in (given, wanted))
    return is_constant_ratio(left, right, positive=given.relations != ("=",))


def _with_less_first(relation: RelationNode) -> RelationNode:
    """Return a > b as b < a, and any other relation as it is."""
    if relation.relations not in ((">",), (">=",)):
        return relation
    mirrored = (relation.relations[0].replace(">", "<"),)
    return RelationNode(relation.sides[::-1], mirrored, "", relation.height)


def _is_solved(relation: RelationNode) -> bool:
    """Return whether a relation says what one variable is, as x = 3 does, and 2x = 6 does not."""
    names = [isinstance(side, str) and bool(variables_in(side)) for side in relation.sides]
    return sum(names) == 1 and len(frozenset().union(*map(variables_in, relation.sides))) == 1


def _labels_agree(given: RelationNode, wanted: RelationNode) -> bool:
    """Return whether both name the same: x and x, f(x) and y, "area" and A."""
    labels = given.label.strip(), wanted.label.strip()
    if labels[0] == labels[1]:
        return True
    if any(isinstance(side, ListNode) for side in (given.sides[0], wanted.sides[0])):
        return False
    called = [bool(re.fullmatch(r"[a-zA-Z]\([a-z]\)", label)) for label in labels]
    return (called[0] and labels[1] == "y") or (called[1] and labels[0] == "y")


def _same_named(relation: RelationNode, value: AnswerTree, *, any_label: bool) -> bool:
    """Compare the value that an equation gives to a name with a value that has no name."""
    if isinstance(value, ListNode) and value.brackets == "{}":
        named = _as_equations(relation)
        return named is not None and _same_lists(named, value)
    named = named_value(relation, any_label=any_label)
    if named is None:
        return False
    if relation.relations[-1] == "~" and same_answer(relation.sides[-1], value):
        return True
    return same_answer(named, value)


def named_value(relation: RelationNode, *, any_label: bool) -> AnswerTree | None:
    """Return the value of `x = 3` or `x = 6/2 = 3`, or None if this is no name with one value.

    Sums and products are names only with `any_label`: the answer to "find m + n" is `m + n = 7`.
    """
    first, *values = relation.sides
    if not variables_in(first) and not isinstance(first, LiteralNode) and not relation.label:
        values = [first, *values]
    elif not relation.label or (not any_label and not _is_name(relation)):
        return None
    if set(relation.relations) - {"=", "~"} or "~" in relation.relations[:-1]:
        return None
    if relation.relations[-1] == "~" and len(values) > 1:
        if not _rounds_to(values[-2], values[-1]):
            return None
        values.pop()
    return values[0] if all(same_answer(values[0], value) for value in values[1:]) else None


def _is_name(relation: RelationNode) -> bool:
    """Return whether the label is a single thing and no sum or product of small variables."""
    names = variables_in(relation.sides[0])
    is_words = isinstance(relation.sides[0], LiteralNode | ListNode)
    capitals = relation.label.isalpha() and relation.label.isupper()
    called = re.fullmatch(r"[a-zA-Z]\([a-zA-Z]+\)", relation.label)
    return is_words or capitals or bool(called) or (len(names) == 1 and relation.label in names)


def _rounds_to(value: AnswerTree, rounded: AnswerTree) -> bool:
    """Return whether a decimal fraction is the value, rounded to its last decimal place."""
    decimal = exact_value(rounded)
    places = (
        place for place in range(_MAX_PLACES) if decimal and 10**place % decimal.denominator == 0
    )
    if decimal is None or (place := next(places, None)) is None:
        return False
    distance = operation("abs", operation("-", value, decimal))
    units = operation("+", operation("*", distance, Fraction(10**place)), Fraction(1, 2))
    return exact_value(operation("floor", units)) == 0


def _as_equations(relation: RelationNode) -> ListNode | None:
    """Return (x, y) = (1, 2) as a list of x = 1 and y = 2."""
    names, values = relation.sides[0], relation.sides[-1]
    if relation.relations != ("=",) or not isinstance(names, ListNode):
        return None
    if not isinstance(values, ListNode) or len(names.items) != len(values.items):
        return None
    pairs = zip(names.items, values.items, strict=True)
    return list_of(
        "{}", (RelationNode(pair, ("=",), str(pair[0]), values.height) for pair in pairs)
    )


def _same_measure(given: AnswerTree, wanted: AnswerTree) -> bool:
    if isinstance(given, MeasureNode) and isinstance(wanted, MeasureNode):
        if given.unit.powers == wanted.unit.powers:
            left, right = (operation("*", each.value, each.unit.size) for each in (given, wanted))
            return (
                given.value == wanted.value if _is_list(given, wanted) else same_answer(left, right)
            )
        kinds = [each.unit.powers for each in (given, wanted)]
        angle = (("degrees", 1),), (("radians", 1),)
        if sorted(kinds) == sorted(angle):
            return same_answer(_in_radians(given), _in_radians(wanted))
        return False
    measure, other = (given, wanted) if isinstance(given, MeasureNode) else (wanted, given)
    if not isinstance(measure, MeasureNode) or not measure.certain:
        return False
    if same_answer(measure.value, other):
        return True
    return measure.unit.powers == (("degrees", 1),) and same_answer(_in_radians(measure), other)


def _is_list(*measures: MeasureNode) -> bool:
    return any(isinstance(measure.value, ListNode | LiteralNode) for measure in measures)


def _in_radians(measure: MeasureNode) -> AnswerTree:
    in_degrees = measure.unit.powers == (("degrees", 1),)
    return operation("degree", measure.value) if in_degrees else measure.value


def _same_literal(given: AnswerTree, wanted: AnswerTree) -> bool:
    """Compare what has no value. A time of day may lack its half of the day."""
    if not isinstance(given, LiteralNode) or not isinstance(wanted, LiteralNode):
        return False
    if given.text == wanted.text:
        return True
    texts = sorted((given.text, wanted.text), key=len)
    return ":" in texts[0] and texts[1] in (f"{texts[0]} am", f"{texts[0]} pm")


def _same_lists(given: AnswerTree, wanted: AnswerTree) -> bool:
    if not isinstance(given, ListNode) or not isinstance(wanted, ListNode):
        return _same_ratio(given, wanted)
    if "matrix" in (given.brackets, wanted.brackets):
        left, right = _rows(given), _rows(wanted)
        return left is not None and right is not None and _same_rows(left, right)
    if given.brackets == wanted.brackets == ":":
        return _same_ratio(given, wanted)
    both_vectors = given.brackets in _VECTORS and wanted.brackets in _VECTORS
    if not both_vectors and given.brackets != wanted.brackets:
        return False
    if len(given.items) != len(wanted.items):
        return False
    if given.brackets != "{}":
        return all(map(_same_end, given.items, wanted.items))
    if _names_matter(given) != _names_matter(wanted):
        return False
    return _same_in_any_order(given.items, wanted.items)


def _names_matter(tree: ListNode) -> bool:
    """Return whether a list gives values to several names, apart from their indices."""
    names = {item.label.partition("_")[0] for item in tree.items if isinstance(item, RelationNode)}
    return len(names) > 1


def _same_in_any_order(given: Sequence[AnswerTree], wanted: Sequence[AnswerTree]) -> bool:
    rest = list(wanted)
    for item in given:
        match = next((place for place, other in enumerate(rest) if same_answer(item, other)), None)
        if match is None:
            return False
        del rest[match]
    return True


def _rows(tree: ListNode) -> list[tuple[AnswerTree, ...]] | None:
    """Return the rows of a matrix, of a tuple as a column, or of a list of lists."""
    if tree.brackets in _VECTORS:
        return [(item,) for item in tree.items]
    rows = [item.items for item in tree.items if isinstance(item, ListNode)]
    return rows if tree.brackets in ("matrix", "[]") and len(rows) == len(tree.items) else None


def _same_rows(
    given: Sequence[Sequence[AnswerTree]], wanted: Sequence[Sequence[AnswerTree]]
) -> bool:
    if list(map(len, given)) != list(map(len, wanted)):
        return False
    return all(
        same_answer(*pair)
        for rows in zip(given, wanted, strict=True)
        for pair in zip(*rows, strict=True)
    )


def _same_ratio(given: AnswerTree, wanted: AnswerTree) -> bool:
    """Compare ratios. A ratio of two numbers may also be written as a fraction."""
    left, right = map(_ratio_of, (given, wanted))
    if left is None or right is None or len(left) != len(right):
        return False
    if any(same_answer(parts[0], Fraction(0)) for parts in (left, right)):
        return all(map(same_answer, left, right))
    return all(
        same_answer(operation("*", left[0], part), operation("*", right[0], other))
        for other, part in zip(left[1:], right[1:], strict=True)
    )


def _ratio_of(tree: AnswerTree) -> tuple[AnswerTree, ...] | None:
    if isinstance(tree, ListNode):
        return tree.items if tree.brackets == ":" else None
    return (tree, Fraction(1)) if isinstance(tree, Fraction | OperationNode) else None
