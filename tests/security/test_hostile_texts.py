"""No hostile text runs code in a verifier, is judged right, or takes a verifier long."""

import os
import sys
import time
from functools import partial

import pytest

from tests.security.hostile_texts import JSON, TEXTS
from tests.timing import least_seconds
from textpolicy.rewards import verifiers
from textpolicy.rewards.verifiers import (
    choice_in,
    choice_match,
    exact_match,
    final_answer,
    has_layout,
    instructions_followed,
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
    python_in,
    read_json,
    repetition,
    set_match,
    set_overlap,
    split_thought,
    tag_share,
    tagged,
)

LIMIT = 0.1
FOLLOWED = {
    "detectable_format:json_format": {},
    "detectable_format:title": {},
    "detectable_format:number_highlighted_sections": {"num_highlights": 9},
    "keywords:forbidden_words": {"forbidden_words": ["(a+)+$"]},
    "length_constraints:number_sentences": {"num_sentences": 9, "relation": "less than"},
}
ANSWER = "77"
# The verdict of a check that has an answer to compare with, and any value of one that reads.
CHECKS = {
    "exact_match": lambda text: exact_match(text, ANSWER),
    "normalised_match": lambda text: normalised_match(text, ANSWER),
    "math_equal": lambda text: math_equal(text, ANSWER),
    "number_equal": lambda text: number_equal(text, ANSWER),
    "choice_match": lambda text: choice_match(text, "E"),
    "set_match": lambda text: set_match(text, "77, 78"),
    "set_overlap": lambda text: set_overlap(text, "77, 78"),
    "json_match": lambda text: json_match(text, {"const": 77}),
    "pattern_match": lambda text: pattern_match(text, "^77$", seconds=10),
}
READERS = {
    "number_in": number_in,
    "choice_in": choice_in,
    "final_answer": final_answer,
    "last_boxed": last_boxed,
    "last_number": last_number,
    "tagged": lambda text: tagged(text, "answer"),
    "has_layout": has_layout,
    "tag_share": tag_share,
    "json_problems": lambda text: list(json_problems(text, {"type": "object"})),
    "instructions_followed": lambda text: instructions_followed(
        text, [*FOLLOWED], [*FOLLOWED.values()]
    ),
    "python_in": python_in,
    "split_thought": split_thought,
    "length_score": lambda text: length_score(text, 1, 5),
    "overlong_penalty": lambda text: overlong_penalty([1] * len(text), 100, 10),
    "repetition": repetition,
    "math_equal, as the answer": lambda text: math_equal("5", text),
    "math_equal, with itself": lambda text: math_equal(text, text),
    "read_json": lambda text: _or_value_error(read_json, text),
}
# These run what the model wrote, on purpose, in a sandbox.
RUN_CODE = {"CodeRun", "code_share", "run_code"}


def _or_value_error(read, text):
    try:
        return read(text)
    except ValueError:
        return None


class Deeds:
    """What Python reports while `watching`: code, programs, sockets, and files to write."""

    def __init__(self):
        self.watching = False
        self.seen = []
        sys.addaudithook(self._note)

    def _note(self, event, facts):
        if self.watching and (
            event.startswith(("exec", "compile", "os.", "subprocess.", "socket.", "ctypes."))
            or (event == "open" and isinstance(facts[2], int) and facts[2] & WRITING)
        ):
            self.seen.append((event, facts))


WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@pytest.fixture(scope="module")
def deeds():
    return Deeds()


def test_a_deed_of_a_check_would_be_seen(deeds, tmp_path):
    deeds.watching = True
    eval("5")
    (tmp_path / "canary").write_text("")
    deeds.watching = False
    assert {event for event, _ in deeds.seen} == {"compile", "exec", "open"}
    deeds.seen.clear()


def test_every_public_verifier_is_attacked():
    attacked = {name.split(",")[0] for name in CHECKS | READERS}
    assert attacked == set(verifiers.__all__) - RUN_CODE


@pytest.mark.proves("S4", "S7")
@pytest.mark.parametrize("name", CHECKS | READERS)
def test_no_text_runs_code_is_right_or_takes_long(attempts, deeds, tmp_path, name):
    judge = (CHECKS | READERS)[name]
    # The first call imports, and starts the processes that match patterns.
    judge("an answer")
    slow = {}
    for title, text in TEXTS.items():
        canary = tmp_path / "canary"
        text = text.replace("{canary}", str(canary))
        deeds.watching, started = name != "pattern_match", time.process_time()
        verdict = judge(text)
        spent, deeds.watching = time.process_time() - started, False
        assert not deeds.seen, title
        assert not canary.exists(), title
        assert name in READERS or not verdict, title
        if spent > LIMIT:
            slow[title] = spent
        attempts.add()
    assert not slow


@pytest.mark.proves("S4", "S7")
@pytest.mark.parametrize("text", JSON.values(), ids=JSON)
def test_text_that_is_not_json_is_a_value_error(attempts, text):
    with pytest.raises(ValueError):
        read_json(text)
    attempts.add()


CATASTROPHES = ["(a+)+$", "(a|aa)+$", "(a|a)*$", "(.*a){20}$", "^(([a-z])+.)+[A-Z]([a-z])+$"]


@pytest.mark.proves("S7")
@pytest.mark.slow
def test_patterns_that_explode_are_killed_on_time(attempts):
    def match(pattern):
        assert not pattern_match("a" * 40 + "!", pattern, seconds=0.1)

    for pattern in CATASTROPHES:
        assert pattern_match("ready again", "again", seconds=5)
        assert least_seconds(partial(match, pattern), below=0.6) < 0.6
        attempts.add()
