"""Cut a mathematical answer, in LaTeX or plain text, into tokens."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

from textpolicy.rewards.verifiers.mathematics.units import UNIT_WORDS

_MAX_LENGTH = 256  # characters
_MAX_EXPONENT_DIGITS = 3  # digits after the e of 1e-3
_MAX_DIGITS = 400  # digits that the exponent adds to a number

_FUNCTION_WORDS = (
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp sqrt abs floor ceil"
)
FUNCTIONS = frozenset(_FUNCTION_WORDS.split())
_SYNONYMS = {
    "*": "\\cdot \\times \\ast \u00d7 · ⋅ \u2217",
    "/": "\\div ÷",
    "-": "\u2212 \u2013 \\minus",
    "+-": "\\pm ± +/-",
    "-+": "\\mp ∓",
    "<=": "\\le \\leq \\leqslant ≤ ⩽",
    ">=": "\\ge \\geq \\geqslant ≥ ⩾",
    "<": "\\lt",
    ">": "\\gt",
    "!=": "\\ne \\neq ≠",
    "~": "\\approx \\simeq ≈ \\doteq",
    "in": "\\in ∈",
    "cup": "\\cup \u222a",
    "cap": "\\cap ∩",
    "setminus": "\\setminus \\backslash \u2216",
    "infinity": "\\infty ∞ infty",
    "pi": "\\pi π",
    "emptyset": "\\emptyset \\varnothing ∅",
    "|": "\\lvert \\rvert \\vert \\abs",
    "sqrt": "\\sqrt √",
    "frac": "\\frac \\dfrac \\tfrac \\cfrac",
    "binom": "\\binom \\dbinom \\tbinom",
    "choose": "\\choose",
    "⟨": "\\langle",
    "⟩": "\\rangle",
    "⌊": "\\lfloor",
    "⌋": "\\rfloor",
    "⌈": "\\lceil",
    "⌉": "\\rceil",
    "(": "\\lparen",
    ")": "\\rparen",
    "[": "\\lbrack",
    "]": "\\rbrack",
    "{": "\\{ \\lbrace",
    "}": "\\} \\rbrace",
    "%": "\\% percent percentage pct",
    "°": "\\degree",
    ":": "\\colon",
    "and": "\\land \\wedge",
    "or": "\\lor \\vee",
    "angle": "\\angle \\triangle ∠",
    ",": ";",
}
_MEANING = {word: sign for sign, words in _SYNONYMS.items() for word in words.split()}
_NAMED = {"pi", "infinity", "emptyset"}
_SPACE_WORDS = "\\, \\! \\: \\; \\quad \\qquad \\left \\right \\displaystyle \\limits \\nolimits"
_SIZES = (f"\\{size}{side}" for size in ("big", "Big", "bigg", "Bigg") for side in ("", "l", "r"))
_SPACES = {*_SPACE_WORDS.split(), *_SIZES}
_GREEK_WORDS = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi rho sigma tau "
    "phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell"
)
_GREEK = frozenset(_GREEK_WORDS.split())
# Runs of letters that are words where a product of variables would be possible.
_PROSE = "no on is it us in at up go so to of by my we he me be do if as am an"
_SHORT_WORDS = frozenset(_PROSE.split())
_PRODUCTS = [set(letters) for letters in ("abcd", "xyzw", "pqr", "mnk", "rst", "uvw", "abxy")]
_MULTIPLIERS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_AFTER_UNIT = ("", "^", "/", ",", "and", "or")
_PHRASES = {"all real numbers": "set R", "no solution": "emptyset", "no solutions": "emptyset"}
_NUMERAL_WORDS = "two three four five six seven eight nine ten eleven twelve"
_NUMERALS = {word: base for base, word in enumerate(_NUMERAL_WORDS.split(), start=2)}

_TEXT = (
    r"\\(?:text(?:bf|it|rm|sf)?|math(?:rm|bf|it|sf)|mbox|boldsymbol|bm|operatorname|rm)"
    r"\s*\{([^{}]*)\}"
)
_SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"(?<!\\)\\(?:[()\[\]]|\s)|[$~]|\*\*(?=\s*$)|^\s*\*\*|\s+", " "),
        ("\u00b2", "^2"),
        ("\u00b3", "^3"),
        (r"(?<=[0-9]) ?(?:\{, ?\}|,\\!|\\,)(?=[0-9]{3})", ""),
        (r"\^ ?\{? ?(?:\\circ|°|\u2218) ?\}?", "°"),
        (r"\\mathbb ?\{? ?([RZNQC]) ?\}?", r" \\text{set \1} "),
        (r"(?<=[0-9.]) ?[xX] ?(?=10 ?(?:\^|\*\*))", "*"),
        (r"\b([ap])\. ?m\b\.?", r"\1m"),
        (r"^ ?([0-9]+) to ([0-9]+) ?$", r"\1:\2"),
        (r"\\begin ?\{(?:[pbB]|small)?matrix\}|\\begin ?\{array\} ?\{[^{}]*\}", "⟦"),
        (r"\\end ?\{(?:[pbB]|small)?matrix\}|\\end ?\{array\}", "⟧"),
        (r"\\over(?:line|rightarrow) ?\{([A-Z]{1,3})\}", r"\1"),
        (r"^ ?\\?\{ ?[a-z] ?(?:\\mid|:|\|)(.*(?:[<>=]|\\[a-z]).*?)\\?\} ?$", r"\1"),
        (r"(?<=[0-9])(?:st|nd|rd|th)\b|(?<=[0-9])\^ ?\{? ?\\text ?\{(?:st|nd|rd|th)\} ?\}?", ""),
        (r"(?:[ .,;:]|\\[,;!:])+$", ""),
    ]
]
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\(?:overline|bar|dot)\s*\{?([0-9]+)\}?")
_DOTTED = re.compile(r"([0-9]*)\.([0-9]*?)([0-9])\3\3+\s*(?:\.\.\.|…|\\l?dots)")
_BASED = re.compile(
    r"(?<![A-Za-z0-9_.])([0-9][0-9A-F]*)\s*_\s*(?:\\text\s*)?"
    r"(?:\{((?:\\text\s*\{[^{}]*\}|[^{}])*)\}|([0-9]+))"
)
_TIME = re.compile(r" ?([0-9]{1,2}) ?: ?([0-5][0-9]) ?([ap]m)? ?", re.IGNORECASE)
_TOKEN = re.compile(
    r"(?P<number>(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
    r"|(?P<name>[^\W\d_]+)(?P<below>_(?:\{[\w+\-, ]*\}|[a-zA-Z0-9]))?"
    r"|(?P<command>\\[a-zA-Z]+|\\\\|\\.)(?P<under>_(?:\{[\w+\-, ]*\}|[a-zA-Z0-9]))?"
    r"|(?P<sign>\+/-|<=|>=|!=|!!|\*\*|[^\s\w])|(?P<low>_)"
)


class UnreadableAnswerError(ValueError):
    """The text is not an answer in this grammar, or exceeds a bound."""


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of an answer.

    `kind` is "number", "name" (of a variable, constant or function), "words" (a text or a unit),
    "literal" (what has no value, such as a time of day) or "sign".
    """

    kind: str
    text: str
    value: Fraction = Fraction(0)
    spaced: bool = False  # whether a space stands in front


def read_tokens(text: str) -> list[Token]:
    """Return the tokens of an answer, or raise `UnreadableAnswerError`."""
    if len(text) > _MAX_LENGTH:
        raise UnreadableAnswerError(f"the answer is longer than {_MAX_LENGTH} characters")
    text = _plain_spelling(text)
    clock = " ".join(re.sub(r"\\text ?\{([^{}]*)\}|\\!", r"\1", text).split())
    if match := _TIME.fullmatch(clock):
        return [Token("literal", f"{int(match[1])}:{match[2]} {(match[3] or '').lower()}".strip())]
    if phrase := _PHRASES.get(clock.lower()):
        return [Token("name" if phrase in _NAMED else "literal", phrase)]
    return _with_inches(_without_thousands(list(_cut(text))))


def _plain_spelling(text: str) -> str:
    """Return the text with one spelling for what cannot be told apart token by token."""
    text = text.replace("\\$", " dollarsign ")
    if text.count("$") == 1 and re.match(r"\s*[-+]?\$\s*[0-9.]", text):
        text = text.replace("$", " dollarsign ")
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return text


def _cut(text: str) -> Iterator[Token]:
    place, spaced = 0, False
    while place < len(text):
        if text[place].isspace():
            place, spaced = place + 1, True
            continue
        place, tokens = _next_tokens(text, place)
        for token in tokens:
            yield replace(token, spaced=spaced)
            spaced = False
        spaced = spaced or not tokens


def _next_tokens(text: str, place: int) -> tuple[int, list[Token]]:
    """Return the tokens that start at `place`, and the place behind them."""
    for pattern, read in _SPECIAL:
        if match := pattern.match(text, place):
            return match.end(), read(match)
    match = _TOKEN.match(text, place)
    if match is None or match["low"]:
        raise UnreadableAnswerError(f"cannot read {text[place : place + 10]!r}")
    if match["number"]:
        return match.end(), [_number(match["number"])]
    if match["name"]:
        return match.end(), _name(match["name"], match["below"] or "")
    if match["command"]:
        command = match["command"]
        if command[1:] in FUNCTIONS | _GREEK:
            return match.end(), _name(command[1:], match["under"] or "")
        return match.end("command"), _command(command)
    return match.end(), [_meaning({"**": "^"}.get(match["sign"], match["sign"]))]


def _number(text: str) -> Token:
    digits, _, exponent = text.lower().partition("e")
    if len(exponent.lstrip("+-")) > _MAX_EXPONENT_DIGITS or abs(int(exponent or 0)) > _MAX_DIGITS:
        raise UnreadableAnswerError("the exponent is too large")
    return Token("number", text, Fraction(digits) * Fraction(10) ** int(exponent or 0))


def _name(word: str, below: str) -> list[Token]:
    """Return a function with its base, a variable with its index, or a run of letters."""
    if word in FUNCTIONS:
        index = [Token("sign", "_"), *_cut(below[1:])] if below else []
        return [Token("name", word), *index]
    if not below:
        return _run(word)
    if word not in _GREEK and len(word) > 3:
        raise UnreadableAnswerError(f"{word!r} has an index")
    index_text = re.sub(r"[\s{}]", "", below)
    if word in _GREEK:
        return [Token("name", word + index_text)]
    return [*map(_letter, word[:-1]), Token("name", word[-1] + index_text)]


def _run(word: str) -> list[Token]:
    """Return what letters without an index mean: a sign, a unit, a product, or a word."""
    if word in _MEANING or word in _NAMED:
        return [_meaning(word)]
    if word in ("and", "or", "in"):
        return [Token("sign", word)]
    if len(word) == 1 or word in _GREEK:
        return [_letter(word)]
    if word in _MULTIPLIERS:
        return [Token("sign", "*"), Token("number", word, Fraction(_MULTIPLIERS[word]))]
    is_unit = word in UNIT_WORDS or word.lower() in UNIT_WORDS or word == "dollarsign"
    if is_unit or len(word) > 3 or word.lower() in _SHORT_WORDS or not _is_product(word):
        return [Token("words", word)]
    return list(map(_letter, word))


def _is_product(word: str) -> bool:
    return len(word) == 2 or any(set(word) <= letters for letters in _PRODUCTS) or word[-1:] == "i"


def _letter(letter: str) -> Token:
    if letter in _MEANING:
        return _meaning(_MEANING[letter])
    return Token("words" if letter in "€£¥¢" else "name", letter)


def _command(command: str) -> list[Token]:
    if command in _SPACES:
        return []
    if command == "\\\\":
        return [Token("sign", command)]
    if command in _MEANING:
        return [_meaning(command)]
    raise UnreadableAnswerError(f"no command {command} is known")


def _meaning(sign: str) -> Token:
    sign = _MEANING.get(sign, sign)
    if sign in "€£¥¢":
        return Token("words", sign)
    return Token("name" if sign in _NAMED or sign == "sqrt" else "sign", sign)


def _read_words(match: re.Match[str]) -> list[Token]:
    """Return what \\text{...} holds: a separator, a letter, mathematics, or words."""
    words = " ".join(match[1].replace("~", " ").replace("\\", " ").split())
    if re.fullmatch("set [RZNQC]", words):
        return [Token("literal", words)]
    if words in ("and", "or", ", and", ", or"):
        return [Token("sign", words.split()[-1])]
    if len(words) == 1 and words in ("i", "e", "d"):
        return [Token("name", words)]
    if re.fullmatch(r"[-+]?[0-9.,/() ]+|\(?[A-Z]\)?|[-+]?[0-9.,]+ ?(?:%|[a-z ]+)?", words):
        return list(_cut(words))
    if words.lower() in _MULTIPLIERS:
        return _run(words.lower())
    return [Token("words", words)] if words else []


def _read_repeating(match: re.Match[str]) -> list[Token]:
    whole, fixed, block = match[1] or "0", match[2], match[3]
    nines = 10 ** len(fixed) * (10 ** len(block) - 1)
    value = int(whole) + Fraction(int(fixed or 0), 10 ** len(fixed)) + Fraction(int(block), nines)
    return [Token("number", match[0], value)]


def _read_based(match: re.Match[str]) -> list[Token]:
    digits, given = match[1].lstrip("0") or "0", (match[2] or match[3] or "").strip()
    word = re.sub(r"\\text\s*|[{}\s]", "", given).lower()
    base = _NUMERALS.get(word) or (int(word) if re.fullmatch("[0-9]{1,2}", word) else 0)
    if not 2 <= base <= 36 or any(int(digit, 16) >= base for digit in digits):
        raise UnreadableAnswerError(f"{match[0]!r} is no number of a base from 2 to 36")
    if base == 10:
        return [_number(digits)]
    return [Token("literal", f"{digits} in base {base}")]


_SPECIAL = [
    (re.compile(_TEXT), _read_words),
    (_REPEATING, _read_repeating),
    (_DOTTED, _read_repeating),
    (_BASED, _read_based),
]


def _with_inches(tokens: list[Token]) -> list[Token]:
    """Return the tokens with each "in" that no set follows as the unit."""
    after = [*(token.text for token in tokens[1:]), ""]
    return [
        replace(token, kind="words") if token.text == "in" and following in _AFTER_UNIT else token
        for token, following in zip(tokens, after, strict=False)
    ]


def _without_thousands(tokens: list[Token]) -> list[Token]:
    """Join 1 , 234 to one number where no bracket makes it a tuple or a list."""
    if any(token.text in tuple("([{⟨⟦") for token in tokens if token.kind == "sign"):
        return tokens
    joined: list[Token] = []
    for token in tokens:
        if len(joined) > 1 and _continues(joined[-2], joined[-1], token):
            joined.pop()
            before = joined.pop()
            value = Fraction((before.text + token.text).replace(",", ""))
            joined.append(Token("number", f"{before.text},{token.text}", value, before.spaced))
        else:
            joined.append(token)
    return joined


def _continues(before: Token, comma: Token, token: Token) -> bool:
    return (
        comma.text == ","
        and not (comma.spaced or token.spaced)
        and re.fullmatch(r"[1-9][0-9]{0,2}(?:,[0-9]{3})*", before.text) is not None
        and re.fullmatch(r"[0-9]{3}(?:\.[0-9]+)?", token.text) is not None
    )
