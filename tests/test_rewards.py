"""Rewards: found by file and name, called in order, and held to a finite number."""

import json
import math
import sys
from fractions import Fraction

import numpy as np
import pytest

from textpolicy.errors import ConfigError, RewardError
from textpolicy.rewards import load_reward, score


@pytest.fixture
def file_of(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(source: str) -> str:
        path = tmp_path / "mine.py"
        path.write_text(source)
        return str(path)

    return write


def test_a_function_in_a_file_is_found_by_name(file_of):
    path = file_of("def good(prompt, completion, example):\n    return example['x'] + 0.5\n")
    assert score(load_reward(f"{path}:good"), "p", "c", {"x": 1}) == 1.5


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        math.inf,
        "1.0",
        [1.0],
        1 + 2j,
        np.float32("nan"),
        np.complex64(1),
        np.ones(1),
        10**400,
        -(10**5000),
    ],
    ids=lambda value: str(value)[:9] if not isinstance(value, int) else "beyond a float",
)
def test_what_is_not_a_finite_number_is_refused_with_its_sample(value):
    def odd(prompt, completion, example):
        return value

    with pytest.raises(RewardError, match=r"reward odd returned .* finite number") as caught:
        score(odd, "the prompt", "the completion", {})
    assert "on prompt 'the prompt', completion 'the completion'" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, 1.0),
        (3, 3.0),
        (None, None),
        (-0.5, -0.5),
        (Fraction(1, 4), 0.25),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3.0),
        (np.bool_(True), 1.0),
    ],
)
def test_numbers_booleans_and_none_are_rewards_and_come_back_as_floats(value, expected):
    reward = score(lambda prompt, completion, example: value, "p", "c", {})
    assert reward == expected and type(reward) is type(expected)


def test_a_dataclass_with_postponed_annotations_may_stand_in_a_reward_file(file_of):
    path = file_of(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Answer:\n    value: float\n"
        "def read(p, c, e):\n    return Answer(0.5).value\n"
    )
    assert score(load_reward(f"{path}:read"), "p", "c", {}) == 0.5


def test_a_reward_file_imports_its_neighbours_at_once_and_later(file_of, tmp_path):
    (tmp_path / "neighbour_now.py").write_text("half = 0.5\n")
    (tmp_path / "neighbour_later.py").write_text("half = 0.5\n")
    path = file_of(
        "from neighbour_now import half\n"
        "def both(p, c, e):\n    import neighbour_later\n    return half + neighbour_later.half\n"
    )
    assert score(load_reward(f"{path}:both"), "p", "c", {}) == 1.0


def test_a_reward_file_named_as_a_known_module_does_not_take_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "json.py").write_text("def good(p, c, e):\n    return 1\n")
    load_reward(f"{tmp_path}/json.py:good")
    assert sys.modules["json"] is json


def test_keyboard_interrupts_pass_through(file_of):
    with pytest.raises(KeyboardInterrupt):
        load_reward(f"{file_of('raise KeyboardInterrupt')}:score")


def test_an_exception_inside_names_function_line_and_sample(file_of):
    path = file_of("def bad(prompt, completion, example):\n    return example['missing']\n")
    with pytest.raises(RewardError, match=r"reward bad raised KeyError: 'missing' \(.*line 2\)"):
        score(load_reward(f"{path}:bad"), "p", "c", {})


def test_long_samples_are_cut_in_messages():
    with pytest.raises(RewardError) as caught:
        score(lambda p, c, e: "no", "p" * 5000, "c" * 5000, {})
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("source", "name", "error", "message"),
    [
        ("x = 1", "score", ConfigError, "has no 'score'; its functions: none"),
        ("def scor(p, c, e): ...", "score", ConfigError, "Did you mean 'scor'"),
        ("score = 3", "score", ConfigError, "is int; expected a function"),
        ("def score(prompt): ...", "score", ConfigError, r"expected \(prompt, completion"),
        ("\n1 / 0", "score", RewardError, "raised ZeroDivisionError.*line 2"),
        ("import sys\nsys.exit(0)", "score", RewardError, "raised SystemExit: 0.*line 2"),
        ("def (", "score", RewardError, "raised SyntaxError"),
    ],
)
def test_a_wrong_reward_file_says_what_is_wrong(file_of, source, name, error, message):
    with pytest.raises(error, match=message):
        load_reward(f"{file_of(source)}:{name}")


def test_a_missing_file_and_a_missing_name_are_said(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_reward(f"{tmp_path}/none.py:score")
    with pytest.raises(ConfigError, match=r"expected FILE\.py:FUNCTION"):
        load_reward("mine.py")
