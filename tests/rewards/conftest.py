"""What tests of rewards share: a file of reward functions that is written for one test."""

import sys
from collections.abc import Callable

import pytest


@pytest.fixture
def write_rewards(tmp_path, monkeypatch) -> Callable[[str], str]:
    """A function that writes a Python file with this source and returns its path."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(source: str) -> str:
        path = tmp_path / "mine.py"
        path.write_text(source)
        return str(path)

    return write
