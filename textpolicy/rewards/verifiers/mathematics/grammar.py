"""Parse mathematical answers into trees. No text is ever evaluated as code.

    answer   = item {("," | "and" | "or") item}
    item     = set {("=" | "<" | "<=" | ">" | ">=" | "!=" | "~" | "in") set}
    set      = measure {("cup" | "cap" | "setminus") measure}

    measure  = [currency] ratio {unit number} [unit]   2 hours 30 minutes     measures.py
    ratio    = sum {":" sum}

    sum      = [sign] product {sign product}           plus, minus, or both   terms.py
    product  = power {["*" | "/"] power}               also 2x, 2(3) and 3 1/2
    power    = value ["^" signed] {"%" | "!" | "!!" | "degree"}
    value    = number | name | function | brackets | "|" sum "|" | matrix

Constants in each file bound every size before anything is computed.
"""

from collections.abc import Sequence

from textpolicy.rewards.verifiers.mathematics.answer_tree import (
    MAX_ITEMS,
    AnswerTree,
    ListNode,
    LiteralNode,
    RelationNode,
    height_over,
    list_of,
    operation,
    with_both_signs,
)
from textpolicy.rewards.verifiers.mathematics.measures import MeasureParser
from textpolicy.rewards.verifiers.mathematics.terms import BRACKETS, END, TermParser, TokenReader
from textpolicy.rewards.verifiers.mathematics.tokens import UnreadableAnswerError, read_tokens

_RELATIONS = ("=", "<", "<=", ">", ">=", "!=", "~", "in")
_SEPARATORS = (",", "and", "or")
_MAX_SEPARATORS = 64
_JOINTS = {"or": "cup", "and": "cap"}


def parse_answer(text: str, *, letters_are_units: bool = False) -> AnswerTree:
    """Return the tree of an answer, or raise `UnreadableAnswerError`.

    With `letters_are_units`, the m of "5 m" is a unit, else a variable.
    """
    tokens = read_tokens(text)
    if all(token.kind == "words" for token in tokens):
        raise UnreadableAnswerError("the answer is words")
    if sum(token.text in _SEPARATORS for token in tokens) > _MAX_SEPARATORS:
        raise UnreadableAnswerError(f"more than {_MAX_SEPARATORS} commas")
    return _AnswerParser(TokenReader(tokens, letters_are_units=letters_are_units)).answer()


class _AnswerParser:
    """A recursive descent parser of lists, relations and sets."""

    def __init__(self, reader: TokenReader) -> None:
        self._reader = reader
        self._terms = TermParser(reader, self._bracketed)
        self._measures = MeasureParser(reader, self._terms)

    def answer(self) -> AnswerTree:
        if self._reader.at("~") or self._reader.at("="):
            self._reader.take()
        if not self._reader.tokens[self._reader.place :]:
            raise UnreadableAnswerError("the answer is empty")
        items, separators = self._items()
        if self._reader.next is not END:
            raise UnreadableAnswerError(f"the answer continues with {self._reader.next.text!r}")
        if len(items) == 1:
            return items[0]
        if (excluded := _excluded(items)) is not None:
            return operation("cap", *excluded)
        joint = _JOINTS.get(separators[0]) if len(set(separators)) == 1 else None
        if joint and all(_is_inequality(item) for item in items):
            return operation(joint, *items)
        return list_of("{}", items)

    def _items(self) -> tuple[list[AnswerTree], list[str]]:
        items, separators = [self._item()], list[str]()
        while self._reader.at(*_SEPARATORS) and len(items) < MAX_ITEMS:
            separator = self._reader.take().text
            if separator == "," and self._reader.at("and", "or"):
                separator = self._reader.take().text
            separators.append(separator)
            items.append(self._item())
        items = [each for item in items for each in with_both_signs(item)]
        if len(items) > MAX_ITEMS:
            raise UnreadableAnswerError(f"more than {MAX_ITEMS} items")
        return items, separators

    def _bracketed(self) -> AnswerTree:
        """Parse items separated by commas up to and including a closing bracket."""
        opening = self._reader.take().text
        if opening == "{" and self._reader.at("}"):
            self._reader.take()
            return "emptyset"
        items: list[AnswerTree] = [self._item()]
        if self._reader.at("choose"):
            self._reader.take()
            items = [operation("binom", items[0], self._item())]
        while self._reader.at(",") and len(items) < MAX_ITEMS:
            self._reader.take()
            items.append(self._item())
        closing = self._reader.take(*BRACKETS[opening]).text
        if len(items) == 1:
            if closing != BRACKETS[opening][-1 if opening == "[" else 0]:
                raise UnreadableAnswerError(f"{opening} is closed by {closing}")
            return items[0]
        if opening == "{":
            items = [each for item in items for each in with_both_signs(item)]
        inner = [item for item in items if isinstance(item, ListNode)]
        if any(isinstance(below, ListNode) for item in inner for below in item.items):
            raise UnreadableAnswerError("lists are nested three deep")
        return list_of(opening + closing, items)

    def _item(self) -> AnswerTree:
        label, words_only = self._label()
        if words_only:
            first: AnswerTree = LiteralNode(label)
            while not self._reader.at("="):
                self._reader.take()
        else:
            first = self._set()
        sides, relations = [first], list[str]()
        while self._reader.at(*_RELATIONS) and len(sides) < MAX_ITEMS:
            relations.append(self._reader.take().text)
            sides.append(self._set())
        if not relations:
            return first
        return RelationNode(tuple(sides), tuple(relations), label, height_over(sides))

    def _label(self) -> tuple[str, bool]:
        """Return what stands before an equals sign, if that is only a name, and if it is words."""
        label, has_words, depth = "", False, 0
        for token in self._reader.tokens[self._reader.place :]:
            if token.text == "=" and depth == 0:
                return (label, has_words or "angle" in label) if label else ("", False)
            depth += (token.text in ("(", "{")) - (token.text in (")", "}"))
            names = token.kind in ("name", "words") or token.text in tuple("(),+-|{}'°^")
            if (not names and token.text != "angle") or (token.text == "," and depth == 0):
                break
            has_words = has_words or token.kind == "words"
            label += f" {token.text} " if token.kind == "words" else token.text
        return "", False

    def _set(self) -> AnswerTree:
        tree = self._measures.measure()
        while self._reader.at("cup", "cap", "setminus"):
            operator = self._reader.take().text
            tree = operation(operator, tree, self._measures.measure())
        return tree


def _is_inequality(tree: AnswerTree) -> bool:
    return isinstance(tree, RelationNode) and not set(tree.relations) & {"=", "~", "in"}


def _excluded(items: Sequence[AnswerTree]) -> list[AnswerTree] | None:
    """Return the inequalities that x != 1, 2 stands for."""
    first, *rest = items
    if not isinstance(first, RelationNode) or first.relations != ("!=",):
        return None
    if any(isinstance(item, RelationNode | ListNode | LiteralNode) for item in rest):
        return None
    name, height = first.sides[0], first.height
    others = (RelationNode((name, item), ("!=",), "", height) for item in rest)
    return [first, *others]
