"""The record every run keeps: one JSON object a step, in a file that needs no account to read."""

import json
from pathlib import Path
from typing import Any

from textpolicy.adapters.files import replacing
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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a line that a killed run left unfinished is left out."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return [json.loads(line) for line in lines[:-1] if line]


def forget_after(path: Path, step: int) -> None:
    """Drop the rows of later steps, which a run that goes on from `step` writes again."""
    kept = [json.dumps(row) + "\n" for row in read_metrics(path) if row["step"] <= step]
    with replacing(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
