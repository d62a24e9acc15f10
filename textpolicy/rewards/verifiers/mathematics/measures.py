"""Parse numbers with units: 5 cm, $5, 60 km/h, 2 hours 30 minutes, 3:2."""

from collections.abc import Sequence
from fractions import Fraction

from textpolicy.rewards.verifiers.mathematics.answer_tree import (
    MAX_ITEMS,
    AnswerTree,
    MeasureNode,
    OperationNode,
    height_over,
    list_of,
    operation,
)
from textpolicy.rewards.verifiers.mathematics.terms import TermParser, TokenReader
from textpolicy.rewards.verifiers.mathematics.tokens import UnreadableAnswerError
from textpolicy.rewards.verifiers.mathematics.units import Unit, read_unit


class MeasureParser:
    """Parses a value, its unit, and smaller measures that are added to it."""

    def __init__(self, reader: TokenReader, terms: TermParser) -> None:
        self._reader = reader
        self._terms = terms
        self._letter_only = False  # whether the last unit is one letter outside of \text{}

    def measure(self) -> AnswerTree:
        """Return the tree of a value with or without a unit."""
        currency = self._currency()
        negative = currency is None and self._reader.at("-") and self._currency(after=1)
        tree = self._ratio()
        if negative:
            tree = operation("-", Fraction(0), tree)
        parts = [(tree, currency or negative or None)]
        while (unit := self._unit()) is not None:
            if parts[-1][1] is None:
                parts[-1] = (parts[-1][0], unit)
            elif parts[-1][1] != unit:
                raise UnreadableAnswerError("a number has two units")
            if self._reader.at("and", ",") and self._measure_follows():
                self._reader.take()
            if self._reader.next.kind == "number":
                parts.append((self._terms.power(), None))
        return self._joined(parts)

    def _measure_follows(self) -> bool:
        """Return whether the next but one token continues "2 hours and 30 minutes"."""
        after = self._reader.tokens[self._reader.place + 1 : self._reader.place + 3]
        if [token.kind for token in after] != ["number", "words"]:
            return False
        unit, before = read_unit(after[1].text), self._reader.before
        larger = read_unit(before.text) if before.kind == "words" else None
        if unit is None or larger is None or unit.powers != larger.powers:
            return False
        return unit.size < larger.size

    def _joined(self, parts: Sequence[tuple[AnswerTree, Unit | None]]) -> AnswerTree:
        """Return one measure for 2 hours 30 minutes."""
        tree, unit = parts[0]
        for value, smaller in parts[1:]:
            if not unit or not smaller or unit.powers != smaller.powers or smaller.size > unit.size:
                raise UnreadableAnswerError("two measures stand side by side")
            share = operation("*", value, smaller.size / unit.size)
            tree = operation("+", tree, share)
        if isinstance(tree, OperationNode) and tree.operator == "degree":
            tree, degrees = tree.operands[0], read_unit("degree")
            if unit is not None and unit.powers[0][0] not in ("degc", "degf", "c", "f"):
                raise UnreadableAnswerError("a number has two units")
            unit = unit or degrees
        if unit is None or not unit.powers:
            return tree
        certain = not self._reader.letters_are_units or not self._letter_only
        return MeasureNode(tree, unit, certain, height_over((tree,)))

    def _ratio(self) -> AnswerTree:
        parts = [self._terms.sum()]
        while self._reader.at(":") and len(parts) < MAX_ITEMS:
            self._reader.take()
            parts.append(self._terms.sum())
        return parts[0] if len(parts) == 1 else list_of(":", parts)

    def _currency(self, after: int = 0) -> Unit | None:
        place = self._reader.place + after
        sign = self._reader.tokens[place].text if place < len(self._reader.tokens) else ""
        if sign not in ("dollarsign", "€", "£", "¥"):
            return None
        self._reader.place += after + 1
        return read_unit("dollars" if sign == "dollarsign" else sign)

    def _unit(self) -> Unit | None:
        """Return the unit that stands here, if one does."""
        if not self._reader.at_unit():
            return None
        self._letter_only = self._reader.next.kind == "name"
        start = self._reader.place
        words: list[str] = []
        while self._reader.next.kind in ("words", "name") or (
            words and self._reader.at("/", "^", "{", "}", "-", "*")
        ):
            words.append(self._reader.take().text)
            if words[-1] in ("^", "-", "{") and self._reader.next.kind == "number":
                words.append(self._reader.take().text)
        text = "".join(word if word in "^-" else f" {word}" for word in words if word not in "{}")
        unit = read_unit(text.replace("^ ", "^").replace("^", " ^").replace("dollarsign", "dollar"))
        if unit is None:
            self._reader.place = start
            raise UnreadableAnswerError(f"{text!r} is no unit")
        return unit
