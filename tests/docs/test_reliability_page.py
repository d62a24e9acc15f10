"""docs/reliability.md shows every row of the table of faults, as the last recorded run found it."""

import re
from pathlib import Path

from tests.faults.attempts import TABLE

PAGE = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text("utf-8")
ROWS = re.findall(r"^\| ([FS]\d+) \| (.*) \| (.*) \| (.*) \| (.*) \|$", PAGE, re.MULTILINE)


def test_the_page_has_the_rows_of_the_table_in_order():
    assert [row[:3] for row in ROWS] == [
        (name, row["tried"], row["holds"]) for name, row in TABLE.items()
    ]


def test_the_recorded_run_made_as_many_attempts_as_the_rows_ask_for():
    for name, _, _, tests, attempts in ROWS:
        if "not_built" in TABLE[name]:
            assert (tests, attempts) == ("not built yet", TABLE[name]["not_built"])
        else:
            assert int(tests) > 0, name
            assert int(attempts.replace(",", "")) >= TABLE[name]["attempts"], name


def test_the_page_says_where_and_when_it_was_recorded():
    assert re.search(r"^Recorded by `make faults` on \d+ \w+ \d{4}: .*Python 3\.", PAGE, re.MULTILINE)


def test_the_rows_that_the_comparison_names_are_rows():
    named = re.findall(r"\b[FS]\d+\b", PAGE)
    assert set(named) <= TABLE.keys()
