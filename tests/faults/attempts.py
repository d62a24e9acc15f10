"""The marker `proves` and the fixture `attempts`: which row a test proves, and how often it tried.

Both reach the report of a test as its properties, so that `pytest --junitxml` writes them to the
file that tools/fault_table.py reads.
"""

import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

TABLE = tomllib.loads(Path(__file__).with_name("table.toml").read_text("utf-8"))


class Attempts:
    """The number of attempts that a test has made. Call it with a number, or `add` one by one."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, number: int) -> None:
        self.made += number

    def add(self) -> None:
        self.made += 1


@pytest.fixture
def attempts(request: pytest.FixtureRequest) -> Iterator[Attempts]:
    """Return the counter of this test's attempts."""
    counter = Attempts()
    yield counter
    request.node.user_properties.append(("attempts", counter.made))


def pytest_itemcollected(item: pytest.Item) -> None:
    """Write the rows that a test proves to its report, and refuse rows that are not there.

    A test that does not count its attempts is one attempt.
    """
    if isinstance(item, pytest.Function) and "attempts" not in item.fixturenames:
        item.user_properties.append(("attempts", 1))
    for mark in item.iter_markers("proves"):
        for row in mark.args:
            if row not in TABLE:
                raise pytest.UsageError(f"{item.nodeid} proves {row!r}: table.toml has no such row")
            item.user_properties.append(("proves", row))
