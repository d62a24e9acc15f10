"""Work that takes long is shown while it lasts."""

import re
import time

import pytest

from textpolicy.activity import doing
from textpolicy.cli.progress import showing_progress


@pytest.fixture
def lines():
    return []


def test_work_is_shown_after_a_while_with_how_much_of_it_is_done(lines):
    with (
        showing_progress(lines.append, after=0.2),
        doing("measuring on held-out tasks"),
        doing("sampling", 512) as sampling,
    ):
        for _ in range(8):
            sampling.advance(4)
            time.sleep(0.1)
    assert len(lines) == 1
    assert re.fullmatch(
        r"measuring on held-out tasks, sampling \(\d+ of 512\) ... [01] s", lines[0]
    )


def test_quick_work_and_the_steps_of_a_run_are_not_shown(lines):
    with showing_progress(lines.append, steps=True, after=0.3):
        for _ in range(5):
            with doing("loading the model"):
                time.sleep(0.1)
        with doing("sampling", 8):
            time.sleep(0.6)
    assert lines == []
