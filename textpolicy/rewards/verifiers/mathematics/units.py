"""Read units of measurement, as the words after a number: "cm^2", "miles per hour", "dollars".

Two units are equal if they measure the same and have the same size. A unit that the table does not
know, such as "apples", measures itself.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

_FOOT, _POUND = Fraction(3048, 10000), Fraction(45359237, 100000000)
# What each unit measures, and for each size its spellings. Plurals in -s are found by rule.
_TABLE: dict[str, dict[Fraction, str]] = {
    "length": {
        Fraction(1): "m meter metre",
        Fraction(1000): "km kilometer kilometre",
        Fraction(1, 10): "dm decimeter decimetre",
        Fraction(1, 100): "cm centimeter centimetre",
        Fraction(1, 1000): "mm millimeter millimetre",
        _FOOT: "ft foot feet",
        _FOOT / 12: "in inch inches",
        _FOOT * 3: "yd yard",
        _FOOT * 5280: "mi mile",
    },
    "mass": {
        Fraction(1): "g gram gramme",
        Fraction(1000): "kg kilogram",
        Fraction(1, 1000): "mg milligram",
        _POUND * 1000: "lb lbs pound",
        _POUND * 1000 / 16: "oz ounce",
        Fraction(10**6): "tonne",
    },
    "time": {
        Fraction(1): "s sec second",
        Fraction(60): "min minute",
        Fraction(3600): "h hr hour",
        Fraction(86400): "day",
        Fraction(604800): "week",
        Fraction(1, 1000): "ms millisecond",
    },
    "volume": {
        Fraction(1): "L liter litre",
        Fraction(1, 1000): "mL ml milliliter millilitre",
    },
    "years": {Fraction(1): "year yr", Fraction(1, 12): "month"},
    "dollars": {Fraction(1): "dollar USD", Fraction(1, 100): "cent ¢"},
    "euros": {Fraction(1): "euro € EUR"},
    "pounds sterling": {Fraction(1): "£ GBP"},
    "yen": {Fraction(1): "yen ¥ JPY"},
    "degrees": {Fraction(1): "degree deg"},
    "radians": {Fraction(1): "radian rad"},
    "nothing": {Fraction(1): "unit"},
    "force": {Fraction(1): "newton N"},
    "energy": {Fraction(1): "joule J", Fraction(1000): "kilojoule kJ"},
    "watts": {Fraction(1): "watt W", Fraction(1000): "kilowatt kW"},
    "volts": {Fraction(1): "volt V"},
    "hertz": {Fraction(1): "hertz Hz"},
}
_UNITS = {
    spelling: (quantity, size)
    for quantity, sizes in _TABLE.items()
    for size, spellings in sizes.items()
    for spelling in spellings.split()
}
_PHRASES = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "sq": "square", "cu": "cubic"}
_MODIFIERS = {"square": 2, "cubic": 3}
UNIT_WORDS = {
    *(word for word in _UNITS if len(word) > 1),
    *(f"{word}s" for word in _UNITS if len(word) > 2),
    *_PHRASES,
    *_MODIFIERS,
    "inches",
    "degC",
    "degF",
}
"""The words that are read as a unit without LaTeX around them."""
LETTER_UNITS = {"m", "g", "s", "h", "L"}
_WORD = re.compile(r"[^\W\d_]+\.?|[\u20ac\u00a3\u00a5\u00a2/^]|-?[0-9]+|\S")


@dataclass(frozen=True, slots=True)
class Unit:
    """What is measured, as powers of quantities and of unknown words, and in which size."""

    powers: tuple[tuple[str, int], ...]
    size: Fraction


def read_unit(text: str) -> Unit | None:
    """Return the unit that the words of `text` name, or None if they name none."""
    found: list[str] = _WORD.findall(text)
    plain = " ".join(_PHRASES.get(word.rstrip("."), word) for word in found)
    words: list[str] = _WORD.findall(plain)
    powers: dict[str, int] = {}
    size, sign, modifier, place = Fraction(1), 1, 1, 0
    while place < len(words):
        word = words[place].rstrip(".")
        place += 1
        if word in ("*", "·"):
            continue
        if word in ("/", "per"):
            sign = -1
        elif word in _MODIFIERS:
            modifier = _MODIFIERS[word]
        elif word in ("", "squared", "cubed") or not (word[0].isalpha() or word in _UNITS):
            return None
        else:
            exponent, place = _exponent(words, place)
            quantity, unit_size = _known(word)
            power = sign * modifier * exponent
            powers[quantity] = powers.get(quantity, 0) + power
            size *= unit_size**power
            modifier = 1
    if not powers or modifier != 1:
        return None
    whole = powers.pop("nothing", 0)
    left = tuple(sorted(item for item in powers.items() if item[1]))
    return Unit(left, size) if left or whole else None


def _exponent(words: list[str], place: int) -> tuple[int, int]:
    """Return the power that stands after a unit, and the place behind it."""
    if place < len(words) and words[place] in ("squared", "cubed"):
        return 2 + (words[place] == "cubed"), place + 1
    if place + 1 < len(words) and words[place] == "^" and re.fullmatch("-?[1-4]", words[place + 1]):
        return int(words[place + 1]), place + 2
    return 1, place


def _known(word: str) -> tuple[str, Fraction]:
    for spelling in (word, word.lower(), word.lower().removesuffix("s")):
        if spelling in _UNITS and (len(spelling) > 1 or spelling == word):
            return _UNITS[spelling]
    return word.lower().removesuffix("s"), Fraction(1)
