"""Verifiers tell the same answer from another one."""

import math

import pytest

from textpolicy.errors import ConfigError
from textpolicy.rewards import score
from textpolicy.rewards.verifiers import (
    choice_in,
    choice_match,
    exact_match,
    final_answer,
    has_layout,
    json_match,
    json_problems,
    last_boxed,
    last_number,
    length_score,
    math_equal,
    normalised_match,
    number_equal,
    number_in,
    overlong_penalty,
    pattern_match,
    read_json,
    repetition,
    set_match,
    set_overlap,
    tag_share,
    tagged,
)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("1/2", "0.5"),
        (r"\frac{1}{2}", "0.5"),
        (r"\frac12", "1/2"),
        (r"\dfrac{-3}{4}", "-0.75"),
        ("50%", "0.5"),
        (r"50\%", "1/2"),
        ("1,234", "1234"),
        (r"1{,}234", "1234"),
        (r"\$5.00", "5"),
        ("1e3", "1000"),
        (r"1.2\times10^{5}", "120000"),
        ("10^{-3}", "0.001"),
        ("2^-1", "1/2"),
        ("2**10", "1024"),
        ("2^3^2", "512"),
        ("-2^2", "-4"),
        ("\u22125", "-5"),
        ("3 1/2", "3.5"),
        (r"3\frac{1}{2}", "7/2"),
        ("sqrt(4)", "2"),
        (r"\sqrt[3]{8}", "2"),
        (r"2\sqrt{2}", r"\sqrt{8}"),
        (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
        (r"2\pi", r"\pi+\pi"),
        (r"\ln 8", r"3\ln 2"),
        (r"90^\circ", "90"),
        (r"5\text{ cm}", "5"),
        ("x = 5", "5"),
        ("x^2+2x+1", "(x+1)^2"),
        ("x/y", "x y^{-1}"),
        (r"x \in [0,1]", "[0,1]"),
        (r"\pm 2", "-2, 2"),
        ("1, 2", "2, 1"),
        ("1 and 2", "2, 1"),
        (r"\{2, 1\}", "{1,2}"),
        (r"\left(\frac{1}{2}, 3\right)", "(0.5, 3)"),
        ("[0,1)", "[0, 1)"),
        (r"$\frac{3}{4}$.", "0.75"),
        (r"so \boxed{\frac{3}{4}}.", "0.75"),
        (r"\boxed{7}", r"\boxed{7}"),
        ("Evelyn", " evelyn."),
        (r"\text{Monday}", r"\text{Monday}"),
        ("2x > y", "y < 2x"),
        ("x^2 = 4", "2x^2 = 8"),
        (r"x \ne 1, 2", r"(-\infty,1)\cup(1,2)\cup(2,\infty)"),
        (r"\sqrt{2} \approx 1.41", r"\sqrt{2}"),
        ("7 hours and 30 minutes", "7.5 hours"),
        (r"\$1.2 \text{ million}", "1200000"),
        (r"\{x \mid x > 3\}", r"(3, \infty)"),
    ],
)
def test_answers_of_equal_value_are_equal(left, right):
    assert math_equal(left, right)
    assert math_equal(right, left)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("0.333", "1/3"),
        ("50", "50%"),
        ("(1,234)", "1234"),
        ("(1,2)", "(2,1)"),
        ("[0,1)", "[0,1]"),
        ("1, 1, 2", "1, 2, 2"),
        ("1, 2", "1, 2, 3"),
        ("x^2+2x", "(x+1)^2"),
        ("2x", "2y"),
        ("3.14159", r"\pi"),
        ("-5", "5"),
        ("Evelyn", "nylevE"),
        ("no", "on"),
        ("", "5"),
        ("I do not know", "5"),
        ("5", ""),
        (r"\boxed{5", "5"),
        ("1/0", "0"),
        ("b-a", "|b-a|"),
        ("100-x", "|x-100|"),
        ("x-100", "|x-100|"),
        (r"\lfloor x/50 \rfloor", "0"),
        ("70 km/m", "70 km/h"),
        ("3x - 6 = x", "x = 3"),
        ("2x = 6", "x = 3"),
        ("-x + 6 < x", "x > 3"),
        ("0:0", "3:2"),
        (r"100 \approx 101", "101"),
        ("x = 3 = 4", "3"),
        ("x = x", "x = 3"),
        ("2, 1", "x = 1, y = 2"),
        ("(3x-2](x-1)", "(3x-2)(x-1)"),
        (r"(3, \infty]", r"(3, \infty)"),
        (r"x \ne 1, 2", r"x \ne 1"),
        ("(B) and (C)", "B"),
        ("no solution", r"\infty"),
        ("y < 2x", "y > 2x"),
    ],
)
def test_answers_of_different_value_are_not(left, right):
    assert not math_equal(left, right)


def test_the_answer_may_be_a_number_of_python():
    assert math_equal("so it is 42", 42) and math_equal("0.5", 0.5) and not math_equal("42", 43)


def test_numbers_are_compared_exactly_or_within_a_relative_tolerance():
    assert number_equal("about 3.14", "3.14") and not number_equal("3.14", math.pi)
    assert number_equal("3.14", math.pi, tolerance=0.001)
    assert not number_equal("-3.14", math.pi, tolerance=0.1)
    assert number_equal("1 / 3 = 1/3", "1/3") and not number_equal("none", 1)
    assert number_in("12 apples, then -1,250.5") == -1250.5 and number_in("none at all") is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"first \boxed{1}, then \boxed{\frac{2}{3}}", r"\frac{2}{3}"),
        ("<answer>4</answer> no, <answer>5</answer>", "5"),
        ("2 + 3\n#### 5\nbye", "5"),
        ("3/4", "3/4"),
        ("I have 3 apples and then 12 of them", "12"),
        ("line one: 7\nline two has 1,024 bytes", "1,024"),
        ("It takes 45 minutes, then it stops.", "45 minutes"),
        ("The answer is 5 cm. That is short.", "5 cm"),
        ("The answer is 12 but not 13", "12"),
        (r"It is $\frac{3}{4}$ of all that was there in the morning.", r"\frac{3}{4}"),
        (r"We know $x^2 = 9$, so there are 2 of them in all of the cases.", "2"),
        ("The total is $36.", "$36"),
        ("x = 3", "x = 3"),
        ("7 apples", "7 apples"),
        (r"\boxed{" + "1" * 20_000 + "}", None),
        (r"\boxed{5", None),
        ("nothing said here", None),
        ("", None),
    ],
)
def test_the_final_answer_is_found_in_the_text_around_it(text, answer):
    assert final_answer(text) == answer


def test_boxes_numbers_and_tags_are_taken_from_the_end():
    assert last_boxed(r"\boxed{a{b}c} \boxed {d}") == "d" and last_boxed("boxed{1}") is None
    assert last_number("a 5-3 b") == "3" and last_number("x=-3") == "-3"
    assert last_number("20% of .5") == ".5" and last_number("x1y") is None
    assert tagged("<a>1</a><a>2", "a") == "1" and tagged("</a><a>", "a") is None


def test_exact_and_normalised_match():
    assert exact_match(" 532\n", 532) and not exact_match("532.", 532)
    assert normalised_match("  The  ANSWER! ", "the answer") and not normalised_match("a", "b")
    assert normalised_match("\uff21\uff22", "ab") and normalised_match("?!", "?!")
    assert not normalised_match("", "a")


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("b.", "B"),
        ("A dog, so the answer is C.", "C"),
        ("not A but (D)", "D"),
        ("a cat is a cat", None),
        ("ABC", None),
        ("F", None),
        ("", None),
    ],
)
def test_the_last_choice_that_stands_alone_counts(text, choice):
    assert choice_in(text) == choice
    assert choice_match(text, "(C)") == (choice == "C")


def test_sets_are_compared_without_order():
    assert set_match("red, Green", ["green", "red"]) and not set_match("red", "red, green")
    assert set_match("a; b", "b;a", separator=";")
    assert set_overlap("a, b", "b, c") == pytest.approx(1 / 3) and set_overlap("", "") == 1.0


def test_length_scores_fall_off_in_a_line():
    assert [length_score("x" * n, 2, 4) for n in (0, 1, 2, 4, 6, 8, 9)] == [0, 0.5, 1, 1, 0.5, 0, 0]
    assert [overlong_penalty(range(n), 10, 4) for n in (0, 6, 8, 10, 20)] == [0, 0, -0.5, -1, -1]


PROSE = (
    "Groups of completions are compared with each other, so that a reward needs no scale. What is "
    "better than the rest of its group becomes more likely, and what is worse less so; where all "
    "are equal there is nothing to learn, and the step is left out."
)


def test_repetition_tells_loops_from_prose_in_any_language():
    chinese = "强化学习让模型从奖励中学习,每一组回答互相比较,好的回答变得更有可能。"
    assert repetition(PROSE) < 0.02 and repetition(chinese) == 0
    for loop in ("the cat sat. ", "猫坐在垫子上。", "aaaaaaaaaaaa"):
        assert repetition(loop * 30) > 0.9
    assert repetition([1, 2, 3, 4] * 20, size=6) > 0.9 and repetition(range(100), size=6) == 0
    assert repetition("short") == 0


def test_a_layout_is_its_tags_once_each_in_order_and_nothing_else():
    assert has_layout("<think>a</think>\n<answer>b</answer>\n")
    for text in (
        "<think>a</think><answer>b</answer> c",
        "<answer>b</answer><think>a</think>",
        "<think>a</think><answer>b",
        "<think>a<answer>b</answer></think>",
        "<think>a</think><think>a</think><answer>b</answer>",
        "",
    ):
        assert not has_layout(text)
    assert tag_share("<think>a</think><answer>") == 0.75 and tag_share("") == 0


def test_patterns_are_searched_for_or_matched_whole():
    assert pattern_match("ab12", r"[0-9]+") and not pattern_match("ab12", r"[0-9]+", whole=True)
    assert pattern_match("a\nb", "a.b", whole=True)
    with pytest.raises(ConfigError, match="no regular expression"):
        pattern_match("x", "(")


@pytest.mark.slow
def test_a_pattern_that_hangs_is_no_match_and_the_next_one_is_unharmed():
    assert not pattern_match("a" * 40 + "b", "(a+)+$", seconds=0.2)
    assert pattern_match("aaa", "(a+)+$")


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "pattern": "^[A-Z]"},
        "age": {"type": "integer", "minimum": 0, "exclusiveMaximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"name": "Ann", "age": 3, "tags": ["a", "b"]}', None),
        ('```json\n{"name": "Ann", "age": 3.0}\n```', None),
        ('{"name": "Ann"}', "$: 'age' is missing"),
        ('{"name": "", "age": 1}', "$.name"),
        ('{"name": "ann", "age": 1}', "$.name"),
        ('{"name": "Ann", "age": true}', '$.age: true violates type "integer"'),
        ('{"name": "Ann", "age": 150}', "$.age"),
        ('{"name": "Ann", "age": 1, "tags": ["a", "c"]}', "$.tags[1]"),
        ('{"name": "Ann", "age": 1, "tags": ["a", "a"]}', "$.tags"),
        ('{"name": "Ann", "age": 1, "x": 1}', "$.x: nothing is allowed here"),
        ("[]", '$: [] violates type "object"'),
        ('{"name": "Ann", "age": NaN}', "not JSON: NaN"),
        ('{"name": "Ann", "age": 1e400}', "not JSON"),
        ('{"age": 1, "age": 2}', "not JSON: a key occurs twice"),
        ("", "not JSON"),
    ],
)
def test_json_is_checked_against_a_schema_and_each_problem_has_a_place(text, problem):
    problems = list(json_problems(text, SCHEMA))
    assert json_match(text, SCHEMA) == (problem is None) == (not problems)
    assert problem is None or problems[0].startswith(problem)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"anyOf": [{"type": "null"}, {"const": 1}]}, ["null", "1"], ["2", "true"]),
        ({"oneOf": [{"minimum": 1}, {"maximum": 5}]}, ["0", "9"], ["3"]),
        ({"allOf": [{"minimum": 1}, {"maximum": 5}]}, ["3"], ["0", "9"]),
        ({"not": {"type": "string"}}, ["1"], ['"x"']),
        ({"type": ["number", "null"], "multipleOf": 0.5}, ["1.5", "null"], ["1.3", '"1"']),
        ({"minItems": 1, "maxItems": 2}, ["[1]", '"any"'], ["[]", "[1, 2, 3]"]),
        ({"minProperties": 1, "maxProperties": 1}, ['{"a": 1}'], ["{}"]),
        ({"additionalProperties": {"type": "integer"}}, ['{"a": 1}'], ['{"a": "b"}']),
        (True, ["1"], []),
        (False, [], ["1"]),
        ({"maxLength": 2, "title": "two"}, ['"ab"', "123"], ['"abc"']),
        ({"exclusiveMinimum": 0}, ["1"], ["0"]),
    ],
)
def test_each_keyword_limits_values(schema, good, bad):
    assert all(json_match(text, schema) for text in good)
    assert not any(json_match(text, schema) for text in bad)


@pytest.mark.parametrize(
    "schema", [{"$ref": "#"}, {"items": {"format": "date"}}, {"properties": {"a": {"iff": 1}}}]
)
def test_an_unknown_keyword_is_an_error(schema):
    with pytest.raises(ConfigError, match="known keywords are"):
        json_match("1", schema)


def test_json_brackets_in_strings_do_not_nest():
    text = '"' + "[" * 200 + '\\"{"'
    assert read_json(text) == "[" * 200 + '"{'
    with pytest.raises(ValueError, match="nested more than 64"):
        read_json("[" * 65 + "]" * 65)


@pytest.mark.parametrize(
    ("calculation", "value"),
    [
        ("341+980", "1321"),
        ("The answer is 341+980.", "1321"),
        ("100-1", "99"),
        ("12*7", "84"),
        (r"\boxed{12 \times 7}", "84"),
        ("3(4)", "12"),
        ("48/6", "8"),
        ("1000/8/5", "25"),
        (r"\frac{48}{6}", "8"),
        ("3+1/2", "3.5"),
        ("2^10", "1024"),
        (r"\sqrt{16}", "4"),
    ],
)
def test_a_calculation_that_is_not_done_is_no_number(calculation, value):
    assert not number_equal(calculation, value) and number_in(value) is not None


@pytest.mark.parametrize(
    ("number", "value"),
    [
        ("1,321", "1321"),
        ("341+980 = 1321", "1321"),
        ("1321 = 341+980", "1321"),
        ("I get 341+980 which is 1321", "1321"),
        ("2/4", "0.5"),
        (r"-\frac{1}{2}", "-0.5"),
        ("3 1/2", "3.5"),
        (r"3\frac{1}{2}", "3.5"),
        ("300%", "3"),
        ("1.5e6", "1500000"),
        (r"-1.5 \times 10^{6}", "-1500000"),
        ("1.5 million", "1500000"),
        ("2 hours 30 minutes", "2.5"),
        ("x = 7", "7"),
    ],
)
def test_a_number_is_read_in_every_spelling(number, value):
    assert number_equal(number, value)


def test_a_verifier_makes_a_reward_in_two_lines():
    def reward(completion, answer):
        return float(math_equal(completion, answer))

    assert score(reward, "1/4+1/4=", "0.5", {"answer": "1/2"}) == 1.0
