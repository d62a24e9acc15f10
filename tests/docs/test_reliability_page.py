"""docs/reliability.md shows every row of the table of faults, and the counts of a recorded run."""

import re
from pathlib import Path

from tests.faults.attempts import TABLE
from tools.fault_table import NO_COUNT, NO_RUN

PAGE = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text("utf-8")
ROWS = re.findall(r"^\| ([FS]\d+) \| (.*) \| (.*) \| (.*) \| (.*) \|$", PAGE, re.MULTILINE)


def test_the_page_has_the_rows_of_the_table_in_order():
    assert [row[:3] for row in ROWS] == [
        (name, row["tried"], row["holds"]) for name, row in TABLE.items()
    ]


def test_a_recorded_run_made_as_many_attempts_as_the_rows_ask_for():
    recorded = re.search(r"^Recorded by `make faults` on .*Python 3\.", PAGE, re.MULTILINE)
    assert recorded or NO_RUN in PAGE
    for name, _, _, tests, attempts in ROWS:
        if recorded:
            assert int(tests) > 0, name
            assert int(attempts.replace(",", "")) >= TABLE[name]["attempts"], name
        else:
            assert (tests, attempts) == (NO_COUNT, NO_COUNT)


def test_the_rows_that_the_comparison_names_are_rows():
    named = re.findall(r"\b[FS]\d+\b", PAGE)
    assert set(named) <= TABLE.keys()
