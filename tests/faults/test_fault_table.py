"""The table of faults fails on every row that has no proof, too few attempts or a failed test."""

import pytest

from tests.faults.attempts import TABLE
from tools.fault_table import faults, read_evidence

PASSED = '<testcase name="a" time="1"><properties>{}</properties></testcase>'
FAILED = '<testcase name="b" time="1"><properties>{}</properties><failure message="no"/></testcase>'
SKIPPED = (
    '<testcase name="c" time="1"><properties>{}</properties><skipped message="no"/></testcase>'
)


def property_of(name, value):
    return f'<property name="{name}" value="{value}"/>'


@pytest.fixture
def report(tmp_path):
    """Return a function that reads a report of these cases of row S18."""

    def read(case, attempts, row="S18"):
        properties = property_of("proves", row) + property_of("attempts", attempts)
        path = tmp_path / "report.xml"
        path.write_text(f"<testsuite>{case.format(properties)}</testsuite>", "utf-8")
        return read_evidence(path)

    return read


def test_a_row_holds_when_its_tests_passed_with_enough_attempts(report):
    row = report(PASSED, TABLE["S18"]["attempts"])["S18"]
    assert list(faults("S18", row)) == []
    assert (row.outcome, row.attempts, row.seconds) == ("1 passed", TABLE["S18"]["attempts"], 1)


@pytest.mark.parametrize(
    ("case", "attempts", "fault"),
    [
        (PASSED, 3, "3 attempts were made, and the row asks for 72"),
        (FAILED, 72, "1 tests failed"),
    ],
)
def test_a_row_with_a_failure_or_few_attempts_does_not_hold(report, case, attempts, fault):
    assert list(faults("S18", report(case, attempts)["S18"])) == [fault]


def test_a_row_without_tests_does_not_hold(report):
    evidence = report(PASSED, 72)
    assert list(faults("F1", evidence["F1"])) == ["no test proves this row"]


def test_a_skipped_test_is_shown_with_its_reason(report):
    row = report(SKIPPED, 0)["S18"]
    assert list(faults("S18", row)) == []
    assert row.notes == ["c skipped: no"]
