"""Parse mathematical answers into trees. No text is ever evaluated as code.

    answer  = item {"," item}
    item    = [name "="] sum
    sum     = ["+" | "-"] product {("+" | "-") product}
    product = power {["*" | "/"] power}            also 2x, 2(3) and 3 1/2
    power   = atom ["^" signed] {"%"}
    atom    = number | name | function atom | "(" answer ")" | "[" answer "]" | "{" answer "}"

Numbers may have thousands separators (1,234) and exponents (1e-3). The parser reads the LaTeX of
answers: \\frac, \\sqrt, \\cdot, \\pi, \\pm, \\text and so on. The constants below bound each size
before anything is computed.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

_MAX_LENGTH = 256  # characters
_MAX_DEPTH = 24  # levels of brackets
_MAX_HEIGHT = 64  # operations on top of each other
_MAX_ITEMS = 24  # items in a list
_MAX_EXPONENT_DIGITS = 3  # digits after the e
_FUNCTIONS = ("sqrt", "root", "frac", "ln", "log", "exp", "abs")

_SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\[()\[\]]|\$", " "),
        (r"\\left|\\right|\\displaystyle|\\[!,;: ]|~", " "),
        (r"\{,\}", ","),
        (r"\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b", ","),
        (r"\\(?:text|mathrm|mbox|textbf)\s*\{[^{}]*\}", " "),
        (r"\^\s*\{?\s*\\circ\s*\}?|°|\\degree", " "),
        (r"\\[dt]?frac\s*([0-9a-z])\s*([0-9a-z])", r" frac{\1}{\2}"),
        (r"\\[dt]?frac", " frac"),
        (r"\\sqrt\s*\[([^\[\]]*)\]", r" root{\1}"),
        (r"\\sqrt|√", " sqrt"),
        (r"\\(?:cdot|times)|[\u00d7\u00b7]|\*(?!\*)", "*"),
        (r"\*\*", "^"),
        (r"\\div|÷", "/"),
        (r"[\u2212\u2013]", "-"),
        (r"\\%", "%"),
        (r"\\pi|π", " pi "),
        (r"\\(ln|log|exp)", r" \1"),
        (r"\\([{}])", r"\1"),
        (r"^\s*[a-zA-Z]\s*\\in", " "),
        (r"[.\s]+$", ""),
    ]
]
_TOKEN = re.compile(
    r"\s*(?:(?P<number>[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?P<exponent>[eE][+-]?[0-9]+)?"
    r"|(?P<name>[a-zA-Z]+|\\[a-zA-Z]+)|(?P<sign>[-+*/^%=,()\[\]{}]))"
)
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])")
_CLOSING = {"(": ")]", "[": ")]", "{": "}"}


class UnreadableAnswerError(ValueError):
    """The text is not an answer in this grammar, or exceeds a bound."""


@dataclass(frozen=True, slots=True)
class OperationNode:
    """An operator or function with its operands."""

    operator: str
    operands: "tuple[Fraction | str | OperationNode | ListNode, ...]"
    height: int


@dataclass(frozen=True, slots=True)
class ListNode:
    """Items in brackets: "{}" (or no brackets) is a set; the order counts in other brackets."""

    brackets: str
    items: "tuple[Fraction | str | OperationNode | ListNode, ...]"
    height: int


AnswerTree = Fraction | str | OperationNode | ListNode
"""A number, the name of a variable or constant, or a node above other trees."""


def parse_answer(text: str) -> AnswerTree:
    """Return the tree of an answer, or raise `UnreadableAnswerError`."""
    if len(text) > _MAX_LENGTH:
        raise UnreadableAnswerError(f"the answer is longer than {_MAX_LENGTH} characters")
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    if text.count("\\pm") + text.count("±") == 1:
        text = ",".join(re.sub(r"\\pm|±", sign, text) for sign in "+-")
    if not re.search(r"[0-9]|[^a-zA-Z\s]", text) and len(text.strip()) > 1 and "pi" not in text:
        raise UnreadableAnswerError("the answer is words")
    if not re.search(r"[(\[{]", text):
        text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    return _Parser(_tokens(text)).answer()


def _operation(operator: str, *operands: AnswerTree) -> OperationNode:
    return OperationNode(operator, operands, _height_over(operands))


def _height_over(trees: Sequence[AnswerTree]) -> int:
    """Return the height of a node above these trees; recursion over a tree needs a bound on it."""
    height = 1 + max(0 if isinstance(tree, Fraction | str) else tree.height for tree in trees)
    if height > _MAX_HEIGHT:
        raise UnreadableAnswerError(f"more than {_MAX_HEIGHT} operations on top of each other")
    return height


def _tokens(text: str) -> list[str | Fraction]:
    tokens: list[str | Fraction] = []
    place, end = 0, len(text.rstrip())
    while place < end:
        match = _TOKEN.match(text, place)
        if match is None:
            raise UnreadableAnswerError(f"cannot read {text[place : place + 10]!r}")
        place = match.end()
        if match["number"]:
            exponent = match["exponent"] or ""
            if len(exponent.lstrip("eE+-")) > _MAX_EXPONENT_DIGITS:
                raise UnreadableAnswerError("the exponent is too large")
            tokens.append(Fraction(match["number"]) * Fraction(10) ** int(exponent[1:] or "0"))
        else:
            tokens.extend(_split_name(match["name"]) if match["name"] else [match["sign"]])
    return tokens


def _split_name(word: str) -> list[str]:
    """Return a function's name, or the letters of a product; refuse longer words."""
    if word in (*_FUNCTIONS, "pi") or word.startswith("\\"):
        return [word]
    if len(word) > 3:
        raise UnreadableAnswerError(f"{word!r} is a word")
    return list(word)


class _Parser:
    """A recursive descent parser that looks one token ahead."""

    def __init__(self, tokens: Sequence[str | Fraction]) -> None:
        self._tokens = tokens
        self._place = 0
        self._depth = 0

    def answer(self) -> AnswerTree:
        tree = self._items("", "")
        if self._next is not None:
            raise UnreadableAnswerError(f"the answer continues with {self._next!r}")
        return tree

    @property
    def _next(self) -> str | Fraction | None:
        return self._tokens[self._place] if self._place < len(self._tokens) else None

    def _take(self, expected: str = "") -> str | Fraction:
        token = self._next
        if token is None or (expected and token not in list(expected)):
            raise UnreadableAnswerError(f"expected {expected or 'more'}, found {token!r}")
        self._place += 1
        return token

    def _items(self, opening: str, closings: str) -> AnswerTree:
        """Parse items separated by commas up to and including a closing bracket, or to the end."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise UnreadableAnswerError(f"nested more than {_MAX_DEPTH} deep")
        items = [self._item()]
        while self._next == ",":
            self._take()
            items.append(self._item())
        closing = str(self._take(closings)) if closings else ""
        self._depth -= 1
        if len(items) == 1:
            return items[0]
        inner = [item for item in items if isinstance(item, ListNode)]
        nested = any(isinstance(below, ListNode) for item in inner for below in item.items)
        if nested or len(items) > _MAX_ITEMS:
            raise UnreadableAnswerError(f"more than {_MAX_ITEMS} items, or lists nested three deep")
        brackets = "{}" if opening in ("", "{") else opening + closing
        return ListNode(brackets, tuple(items), _height_over(items))

    def _item(self) -> AnswerTree:
        tree = self._sum()
        if self._next == "=" and isinstance(tree, str):
            self._take()
            tree = self._sum()
        return tree

    def _sum(self) -> AnswerTree:
        tree = self._signed(self._product)
        while self._next in ("+", "-"):
            operator = str(self._take())
            tree = _operation(operator, tree, self._product())
        return tree

    def _signed(self, rest: Callable[[], AnswerTree]) -> AnswerTree:
        negative = False
        while self._next in ("+", "-"):
            negative ^= self._take() == "-"
        tree = rest()
        return _operation("-", Fraction(0), tree) if negative else tree

    def _product(self) -> AnswerTree:
        tree = self._power()
        while (token := self._next) is not None:
            if token in ("*", "/"):
                operator = str(self._take())
                tree = _operation(operator, tree, self._signed(self._power))
            elif isinstance(token, Fraction) or token == "frac":
                tree = self._mixed(tree)
            elif token in ("(", "[", "{") or str(token)[0].isalpha() or str(token)[0] == "\\":
                tree = _operation("*", tree, self._power())
            else:
                break
        return tree

    def _mixed(self, whole: AnswerTree) -> AnswerTree:
        """Parse `3 1/2` and `3\\frac{1}{2}` as a sum, but `x \\frac{1}{2}` as a product."""
        simple = isinstance(whole, Fraction) and whole.denominator == 1
        if self._next == "frac":
            return _operation("+" if simple else "*", whole, self._power())
        top = self._take()
        if not simple or self._next != "/":
            raise UnreadableAnswerError("two numbers stand side by side")
        self._take("/")
        bottom = self._take()
        if not isinstance(top, Fraction) or not isinstance(bottom, Fraction):
            raise UnreadableAnswerError("a fraction is incomplete")
        return _operation("+", whole, _operation("/", top, bottom))

    def _power(self) -> AnswerTree:
        tree = self._atom()
        if self._next == "^":
            self._take()
            # A minus belongs to the exponent, and 2^3^2 is 2^(3^2).
            self._depth += 1
            tree = _operation("^", tree, self._signed(self._power))
            self._depth -= 1
        while self._next == "%":
            self._take()
            tree = _operation("/", tree, Fraction(100))
        return tree

    def _atom(self) -> AnswerTree:
        if self._depth > _MAX_DEPTH:
            raise UnreadableAnswerError(f"nested more than {_MAX_DEPTH} deep")
        token = self._take()
        if isinstance(token, Fraction):
            return token
        if token in _CLOSING:
            return self._items(token, _CLOSING[token])
        if token in _FUNCTIONS:
            arity = 2 if token in ("frac", "root") else 1
            self._depth += 1
            operands = tuple(self._atom() for _ in range(arity))
            self._depth -= 1
            return _operation("/" if token == "frac" else token, *operands)
        if token[0].isalpha() or token[0] == "\\":
            return token
        raise UnreadableAnswerError(f"expected a value, found {token!r}")
