"""Which values of a parametrized test belong to the quick tests."""

from collections.abc import Iterable
from typing import Any

import pytest


def quick_first(number: int, values: Iterable[Any]) -> list[Any]:
    """Return the values of a test with one argument; all but the first few are slow."""
    return [
        value if place < number else pytest.param(value, marks=pytest.mark.slow)
        for place, value in enumerate(values)
    ]
