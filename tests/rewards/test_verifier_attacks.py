"""Texts with which a model could deceive, hang or take over a verifier; each check is fast."""

import time
from functools import partial

import pytest

from tests.timing import least_seconds
from textpolicy.rewards.verifiers import (
    choice_in,
    exact_match,
    final_answer,
    has_layout,
    json_match,
    last_boxed,
    last_number,
    math_equal,
    normalised_match,
    number_equal,
    pattern_match,
    read_json,
    repetition,
    set_match,
    tag_share,
    tagged,
)

LIMIT = 0.5
CANARY = "textpolicy-verifier-canary"
MATHS = {
    "code": "__import__('os').system('touch {canary}')",
    "code in a box": r"\boxed{__import__('os').system('touch {canary}')}",
    "attribute walk": "().__class__.__bases__[0].__subclasses__()",
    "a lambda": "(lambda: 5)()",
    "power tower": "9**9**9",
    "power tower in LaTeX": "9^{9^{9}}",
    "power of a power": "((2^2000)^2000)^2000",
    "negative power": "2^{-99999999}",
    "power of a root": r"\sqrt{2}^{9^{300}}",
    "fractional power": "2^{1/99999999999}",
    "factorial": "10000000!",
    "factorial call": "factorial(10**7)",
    "huge exponent": "1e999999999",
    "huge exponent in a fraction": "1/1e999999999",
    "digits": "9" * 100_000,
    "digits inside the length": "9" * 250,
    "decimals": "0." + "3" * 100_000,
    "nesting": "(" * 100_000,
    "closed nesting": "(" * 120 + "5" + ")" * 120,
    "nested roots": r"\sqrt{" * 40 + "5" + "}" * 40,
    "nested fractions": r"\frac{" * 30 + "5" + "}{2}" * 30,
    "minus signs": "-" * 255 + "5",
    "percent signs": "5" + "%" * 250,
    "powers in a row": "2" + "^2" * 120,
    "sum": "1" + "+1" * 127,
    "product": "9" * 100 + "*" + "9" * 100,
    "list": "1," * 127 + "1",
    "lists of lists": "{1," * 60 + "1" + "}" * 60,
    "exponentials": r"\exp" * 10 + "9",
    "logarithms of zero": r"\ln 0",
    "root of minus one": r"\sqrt{-1}",
    "division by zero": "1/0",
    "zero to a minus": "0^{-1}",
    "infinity": r"\infty",
    "not a number": "nan",
    "infinite float": "inf",
    "underscores": "1_000_000",
    "other digits": "\u0665",
    "null byte": "5\x00",
    "lone surrogate": "\ud800",
    "right to left": "\u202e5",
    "many boxes": r"\boxed{" * 20_000,
    "many closed boxes": r"\boxed{1}" * 20_000,
    "many tags": "<answer>" * 20_000,
    "many minus signs": "- " * 50_000,
    "many commas": "1" + "," * 100_000,
    "wide letters": "\ufdfa" * 20_000,
    "punctuation": "a" + "!" * 100_000 + "a",
    "commands": r"\alpha" * 10_000,
}


# CPU time, because other programs on the machine also take time.
def seconds(check, *arguments, **options):
    started = time.process_time()
    assert not check(*arguments, **options)
    return time.process_time() - started


@pytest.mark.parametrize("text", MATHS.values(), ids=MATHS)
def test_no_attack_on_mathematics_is_right_or_slow(text, tmp_path):
    canary = tmp_path / CANARY
    text = text.replace("{canary}", str(canary))
    assert seconds(math_equal, text, "77") < LIMIT
    assert seconds(number_equal, text, "77") < LIMIT
    assert not canary.exists()


@pytest.mark.parametrize("text", MATHS.values(), ids=MATHS)
def test_no_attack_is_slow_if_it_is_the_answer_of_a_row(text):
    started = time.process_time()
    math_equal("5", text)
    math_equal(text, text)
    assert time.process_time() - started < 2 * LIMIT


LONG = {
    "one letter": "a" * 200_000,
    "spaces": " " * 200_000,
    "punctuation": "a" + "!" * 200_000 + "a",
    "quotes": '"\\' * 100_000,
    "open brackets": "[" * 200_000,
    "open objects": '{"a":' * 40_000,
    "open tags": "<think>" * 30_000,
    "boxes": "\\boxed{" * 30_000,
    "digits": "1," * 100_000,
    "words": "ab " * 70_000,
    "combining": "e" + "\u0301" * 200_000,
    "expanding": "\ufdfa" * 200_000,
}
READERS = {
    "exact_match": lambda text: exact_match(text, "5"),
    "normalised_match": lambda text: normalised_match(text, "5"),
    "choice_in": choice_in,
    "set_match": lambda text: set_match(text, "5"),
    "repetition": lambda text: repetition(text) < 0,
    "final_answer": lambda text: final_answer(text) == "5",
    "last_boxed": last_boxed,
    "last_number": lambda text: last_number(text) == "5",
    "tagged": lambda text: tagged(text, "answer"),
    "has_layout": has_layout,
    "tag_share": lambda text: tag_share(text) > 1,
    "json_match": lambda text: json_match(text, {"const": 5}),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_no_text_takes_any_reader_long(reader):
    slow = {name: spent for name in LONG if (spent := seconds(reader, LONG[name])) > LIMIT}
    assert not slow


JSON = {
    "nesting": "[" * 200_000,
    "closed nesting": "[" * 5_000 + "]" * 5_000,
    "not a number": '{"a": NaN}',
    "infinity": "-Infinity",
    "beyond a float": "1e400",
    "digits": "9" * 100_000,
    "twins": '{"a": 1, "a": 2}',
    "lone surrogate": '"\ud800',
    "code": "__import__('os')",
    "trailing": "{} {}",
}


@pytest.mark.parametrize("text", JSON.values(), ids=JSON)
def test_text_that_is_not_json_is_a_value_error_in_time(text):
    started = time.process_time()
    with pytest.raises(ValueError):
        read_json(text)
    assert time.process_time() - started < LIMIT


CATASTROPHES = ["(a+)+$", "(a|aa)+$", "(a|a)*$", "(.*a){20}$", "^(([a-z])+.)+[A-Z]([a-z])+$"]


@pytest.mark.slow
def test_patterns_that_explode_are_killed_on_time():
    def match(pattern):
        assert not pattern_match("a" * 40 + "!", pattern, seconds=0.1)

    for pattern in CATASTROPHES:
        assert pattern_match("ready again", "again", seconds=5)
        assert least_seconds(partial(match, pattern), below=0.6) < 0.6
