"""The record every run keeps: one JSON object a step, in a file that needs no account to read."""

import json
from pathlib import Path

from textpolicy.types import Metrics


class MetricsFile:
    """Appends a line a step and flushes it, so that a killed run leaves whole lines behind."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Metrics) -> None:
        """Append `metrics` as the line of `step`."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
