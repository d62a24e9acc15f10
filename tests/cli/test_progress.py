"""Work of more than two seconds is shown while it lasts."""

import time

import pytest

from textpolicy.activity import doing
from textpolicy.cli.progress import showing_progress


@pytest.fixture
def lines():
    return []


def test_work_is_shown_after_two_seconds_with_how_much_of_it_is_done(lines):
    with (
        showing_progress(lines.append),
        doing("measuring on held-out tasks"),
        doing("sampling", 512) as sampling,
    ):
        for _ in range(25):
            sampling.advance(4)
            time.sleep(0.1)
    assert len(lines) == 1
    assert lines[0].startswith("measuring on held-out tasks, sampling (")
    assert lines[0].endswith(" of 512) ... 2 s")


def test_quick_work_and_the_steps_of_a_run_are_not_shown(lines):
    with showing_progress(lines.append, steps=True):
        for _ in range(5):
            with doing("loading the model"):
                time.sleep(0.1)
        with doing("sampling", 8):
            time.sleep(2.4)
    assert lines == []
