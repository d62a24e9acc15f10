"""Parse sums, products, powers, functions and matrices from the tokens of an answer."""

from collections.abc import Callable, Sequence
from fractions import Fraction

from textpolicy.rewards.verifiers.mathematics.answer_tree import (
    MAX_ITEMS,
    AnswerTree,
    LiteralNode,
    OperationNode,
    list_of,
    operation,
)
from textpolicy.rewards.verifiers.mathematics.tokens import FUNCTIONS, Token, UnreadableAnswerError
from textpolicy.rewards.verifiers.mathematics.units import LETTER_UNITS

_MAX_DEPTH = 24  # levels of brackets
BRACKETS = {"(": ")]", "[": ")]", "{": "}", "⟨": "⟩"}
"""The brackets that open, and those that may close them."""
_ROUNDINGS = {"⌊": ("⌋", "floor"), "⌈": ("⌉", "ceil")}
_STARTS = ("(", "[", "{", "sqrt", "frac", "binom", "⌊", "⌈")
_INVERSES = {name: f"arc{name}" for name in ("sin", "cos", "tan")}
END = Token("sign", "")
"""Stands behind the last token."""


class TokenReader:
    """The tokens of an answer, and the place up to which they are read."""

    def __init__(self, tokens: Sequence[Token], *, letters_are_units: bool) -> None:
        self.tokens = list(tokens)
        self.letters_are_units = letters_are_units
        self.place = 0
        self.open_bars = 0  # absolute values that are open since the last bracket
        self._depth = 0

    @property
    def next(self) -> Token:
        """The token that is read next, or `END`."""
        return self.tokens[self.place] if self.place < len(self.tokens) else END

    @property
    def before(self) -> Token:
        """The token that was read last, or `END`."""
        return self.tokens[self.place - 1] if self.place else END

    def at(self, *signs: str) -> bool:
        """Return whether the next token is one of these signs or names."""
        return self.next.text in signs and self.next.kind in ("sign", "name")

    def take(self, *expected: str) -> Token:
        """Return the next token, which must be one of those expected, and move behind it."""
        token = self.next
        if token is END or (expected and token.text not in expected):
            raise UnreadableAnswerError(f"expected {expected or 'more'}, found {token.text!r}")
        self.place += 1
        return token

    def nested(self, read: Callable[[], AnswerTree]) -> AnswerTree:
        """Read with one more level of nesting, in which no absolute value is open."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise UnreadableAnswerError(f"nested more than {_MAX_DEPTH} deep")
        bars, self.open_bars = self.open_bars, 0
        tree = read()
        self.open_bars = bars
        self._depth -= 1
        return tree

    def at_unit(self) -> bool:
        """Return whether a unit starts here, and no further factor of a product."""
        if self.next.kind == "words":
            return True
        if not (self.letters_are_units and self.next.kind == "name"):
            return False
        if self.next.text not in LETTER_UNITS or self.before.kind != "number":
            return False
        after = self.tokens[self.place + 1 :]
        return not after or after[0].text in ("^", "/", ",", "and", "or")


class TermParser:
    """A recursive descent parser of what has a number as its value.

    `bracketed` reads what stands in brackets, which may also be a list.
    """

    def __init__(self, reader: TokenReader, bracketed: Callable[[], AnswerTree]) -> None:
        self._reader = reader
        self._bracketed = bracketed

    def sum(self) -> AnswerTree:
        """Return the tree of a sum."""
        tree = self._signed(self._product)
        while self._reader.at("+", "-", "+-", "-+"):
            operator = self._reader.take().text
            tree = operation(operator, tree, self._signed(self._product))
        return tree

    def _signed(self, rest: Callable[[], AnswerTree]) -> AnswerTree:
        negative = False
        while self._reader.at("+", "-"):
            negative ^= self._reader.take().text == "-"
        if self._reader.at("+-", "-+"):
            return operation(self._reader.take().text, Fraction(0), rest())
        tree = rest()
        return operation("-", Fraction(0), tree) if negative else tree

    def _product(self) -> AnswerTree:
        tree = self.power()
        while True:
            if self._reader.at("*", "/"):
                operator = self._reader.take().text
                tree = operation(operator, tree, self._signed(self.power))
            elif self._reader.next.kind == "number" and self._reader.before.text in ("!", "!!"):
                tree = operation("*", tree, self.power())
            elif self._reader.next.kind == "number" or self._reader.at("frac"):
                tree = self._mixed(tree)
            elif self._continues_product():
                tree = operation("*", tree, self.power())
            else:
                return tree

    def _continues_product(self) -> bool:
        if self._reader.at_unit() or self._reader.at("infinity", "emptyset"):
            return False
        return (
            self._reader.next.kind == "name"
            or self._reader.at(*_STARTS)
            or (self._reader.at("|") and not self._reader.open_bars)
        )

    def _mixed(self, whole: AnswerTree) -> AnswerTree:
        """Parse `3 1/2` and `3\\frac{1}{2}` as a sum, but `x \\frac{1}{2}` as a product."""
        simple = isinstance(whole, Fraction) and whole.denominator == 1
        if self._reader.at("frac"):
            part = self._value()
            numbers = isinstance(part, OperationNode) and all(
                isinstance(operand, Fraction) for operand in part.operands
            )
            if simple and numbers:
                return self._with_marks(operation("+", whole, part))
            return operation("*", whole, self._raised(part))
        top = self._reader.take()
        if not simple or not self._reader.at("/"):
            raise UnreadableAnswerError("two numbers stand side by side")
        self._reader.take("/")
        bottom = self._reader.take()
        if top.kind != "number" or bottom.kind != "number":
            raise UnreadableAnswerError("a fraction is incomplete")
        return operation("+", whole, operation("/", top.value, bottom.value))

    def power(self) -> AnswerTree:
        """Return the tree of a value with what is written behind it: an exponent, ! or %."""
        return self._raised(self._value())

    def _raised(self, tree: AnswerTree) -> AnswerTree:
        tree = self._with_marks(tree)
        if self._reader.at("^"):
            self._reader.take()
            # A minus belongs to the exponent, and 2^3^2 is 2^(3^2).
            tree = operation("^", tree, self._reader.nested(lambda: self._signed(self.power)))
        return self._with_marks(tree)

    def _with_marks(self, tree: AnswerTree) -> AnswerTree:
        while self._reader.at("%", "!", "!!", "°"):
            mark = self._reader.take().text
            if mark == "%":
                tree = operation("/", tree, Fraction(100))
            else:
                tree = operation("degree" if mark == "°" else mark, tree)
        return tree

    def _value(self) -> AnswerTree:
        token = self._reader.next
        if token.kind == "number":
            return self._reader.take().value
        if token.kind == "literal":
            return LiteralNode(self._reader.take().text)
        if self._reader.at(*BRACKETS):
            return self._reader.nested(self._bracketed)
        if self._reader.at("|"):
            return self._reader.nested(self._absolute)
        if self._reader.at(*_ROUNDINGS):
            closing, name = _ROUNDINGS[self._reader.take().text]
            tree = operation(name, self._reader.nested(self.sum))
            self._reader.take(closing)
            return tree
        if self._reader.at("⟦"):
            return self._reader.nested(self._matrix)
        if self._reader.at("frac", "binom", "sqrt") or token.text in FUNCTIONS:
            return self._reader.nested(self._function)
        if token.kind == "name":
            return self._reader.take().text
        raise UnreadableAnswerError(f"expected a value, found {token.text!r}")

    def _absolute(self) -> AnswerTree:
        self._reader.open_bars = 1
        self._reader.take("|")
        tree = self.sum()
        self._reader.take("|")
        return operation("abs", tree)

    def _matrix(self) -> AnswerTree:
        self._reader.take("⟦")
        rows = [[self.sum()]]
        while not self._reader.at("⟧") and len(rows) + len(rows[-1]) < 2 * MAX_ITEMS:
            if self._reader.take("&", "\\\\").text == "&":
                rows[-1].append(self.sum())
            elif not self._reader.at("⟧"):
                rows.append([self.sum()])
        self._reader.take("⟧")
        if len({len(row) for row in rows}) > 1:
            raise UnreadableAnswerError("the rows of a matrix differ in length")
        return list_of("matrix", [list_of("row", row) for row in rows])

    def _function(self) -> AnswerTree:
        name = self._reader.take().text
        if name in ("frac", "binom"):
            return operation("/" if name == "frac" else name, self._argument(), self._argument())
        if name == "sqrt":
            if not self._reader.at("["):
                return operation("sqrt", self._value())
            degree = self._bracketed()
            return operation("root", degree, self._value())
        base = exponent = None
        while self._reader.at("_", "^"):
            if self._reader.take().text == "_":
                base = self._value()
            else:
                exponent = self._signed(self._value)
        if exponent == operation("-", Fraction(0), Fraction(1)) and name in _INVERSES:
            name, exponent = _INVERSES[name], None
        operand = self._operand()
        tree = operation(name, operand) if base is None else operation(name, operand, base)
        return tree if exponent is None else operation("^", tree, exponent)

    def _argument(self) -> AnswerTree:
        """Parse an argument of \\frac, which is one digit if it has no braces."""
        token = self._reader.next
        if token.kind == "number" and len(token.text) > 1 and token.text.isdigit():
            rest = token.text[1:]
            self._reader.tokens[self._reader.place] = Token("number", rest, Fraction(rest))
            return Fraction(token.text[0])
        return self._value()

    def _operand(self) -> AnswerTree:
        """Parse the operand of a function: brackets, or a product without a sign, as in sin 2x."""
        if self._reader.at("(", "[", "{", "|"):
            return self._with_marks(self._value())
        tree = self._signed(self.power)
        while self._reader.at("frac") or (
            self._reader.next.kind == "name"
            and self._reader.next.text not in FUNCTIONS
            and self._continues_product()
        ):
            tree = operation("*", tree, self.power())
        return tree
