"""The examples run as a reader would run them."""

import subprocess
import sys
from pathlib import Path

import pytest

from textpolicy.rewards import load_reward, score

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.slow
def test_the_circle_example_reloads_each_new_version():
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / "circle.py", "2"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "next samples use version 2" in done.stdout


def test_the_example_rewards_load_and_score():
    close = load_reward(f"{EXAMPLES}/my_reward.py:close")
    example = {"sum": 532}
    scores = [score(close, "347+185=", text, example) for text in ("532", "531", "5", "cat", "")]
    assert scores == sorted(scores, reverse=True)
    assert (scores[0], scores[-1]) == (1.0, 0.0)
    only_even = load_reward(f"{EXAMPLES}/my_reward.py:only_even_sums")
    assert score(only_even, "347+185=", "532", example) == 1.0
    assert score(only_even, "347+186=", "533", {"sum": 533}) is None
    both = load_reward(f"{EXAMPLES}/my_reward.py:both")
    assert score(both, "347+185=", "532", example) == 1 + 0.1 / 4
    assert score(load_reward(f"{EXAMPLES}/my_reward.py:unlike_the_others"), "p", "c", {}) == 1.0
