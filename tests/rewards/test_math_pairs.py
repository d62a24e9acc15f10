"""Answers as models write them, beside right answers: what is equal, and what is not.

`math_pairs_held_back.jsonl` was written before the verifier and first read after it was done.
"""

import json
from itertools import groupby
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path

import pytest

from textpolicy.rewards.verifiers import math_equal

FILES = [Path(__file__).with_name(f"math_pairs{end}.jsonl") for end in ("", "_held_back")]
PAIRS = [json.loads(line) for path in FILES for line in path.read_text("utf-8").splitlines()]
KINDS = {
    kind: list(pairs)
    for kind, pairs in groupby(sorted(PAIRS, key=itemgetter("kind")), itemgetter("kind"))
}


@pytest.fixture(scope="module")
def elsewhere():
    """Return a process without the type checks of the tests, which take most of the time."""
    with get_context("spawn").Pool(1) as pool:
        yield pool


def judged_wrongly(kind):
    """Return the pairs of a kind that the verifier does not judge as their writer does."""
    return [
        pair for pair in KINDS[kind] if math_equal(pair["answer"], pair["gold"]) != pair["equal"]
    ]


def refused_in_a_box(kind):
    """Return the right answers of a kind that are not right in a box."""
    golds = {pair["gold"] for pair in KINDS[kind]}
    return [gold for gold in golds if not math_equal(f"\\boxed{{{gold}}}", gold)]


@pytest.mark.parametrize("kind", KINDS)
def test_right_answers_are_told_from_wrong_ones(elsewhere, kind):
    assert elsewhere.apply(judged_wrongly, [kind]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_of_a_row_is_right_as_it_is_written_and_in_a_box(elsewhere, kind):
    assert elsewhere.apply(refused_in_a_box, [kind]) == []


# A change of one digit changes these answers, whichever digit it is.
EXACT = (
    "numbers",
    "fractions",
    "percent and money",
    "tuples and lists",
    "sets",
    "bases",
)


def with_another_digit():
    """Yield every right answer of these kinds, beside itself with one digit changed."""
    for gold in sorted({pair["gold"] for kind in EXACT for pair in KINDS[kind]}):
        for place, old in enumerate(gold):
            for digit in set("0123456789") - {old} if old.isdigit() else ():
                yield gold, f"{gold[:place]}{digit}{gold[place + 1 :]}"


def accepted_with_another_digit():
    """Return how many answers there are with another digit, and those that are accepted."""
    pairs = list(with_another_digit())
    return len(pairs), [pair for pair in pairs if math_equal(f"\\boxed{{{pair[1]}}}", pair[0])]


def test_an_answer_with_another_digit_is_wrong(elsewhere):
    tried, accepted = elsewhere.apply(accepted_with_another_digit)
    assert tried > 1500 and accepted == []


def test_the_pairs_are_many_and_balanced():
    assert len(PAIRS) >= 700 and len(KINDS) >= 20
    share = sum(pair["equal"] for pair in PAIRS) / len(PAIRS)
    assert 0.45 < share < 0.6
    assert all(0 < sum(pair["equal"] for pair in pairs) < len(pairs) for pairs in KINDS.values())
