"""The record every run keeps: one JSON object a line, in files that need no account to read."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from textpolicy.errors import DataError
from textpolicy.tracking.sink import SampleRow
from textpolicy.tracking.values import to_json_number
from textpolicy.types import Metrics

_NOT_FINITE = {"NaN", "Infinity", "-Infinity"}


class RunFiles:
    """Appends to `metrics`, and to `samples` if given; each line is whole when `write` returns.

    Rows of `resume_step` and later steps are dropped first: a run that goes on from a checkpoint
    writes them again, and a new run begins with none.
    """

    def __init__(self, metrics: Path, samples: Path | None = None, *, resume_step: int = 0) -> None:
        self._metrics = _LineFile(metrics, resume_step)
        self._samples = _LineFile(samples, resume_step) if samples else None

    def write(self, step: int, metrics: Metrics) -> None:
        """Append `metrics` as a line of `step`."""
        finite = {name: to_json_number(value) for name, value in metrics.items()}
        self._metrics.append([{"step": step, **finite}])

    def write_samples(self, step: int, samples: Sequence[SampleRow]) -> None:
        """Append a line for each completion."""
        if self._samples:
            self._samples.append(samples)

    def close(self) -> None:
        """Close the files."""
        self._metrics.close()
        if self._samples:
            self._samples.close()


class _LineFile:
    def __init__(self, path: Path, resume_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_rows_from(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        self.close = self._file.close

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        # ASCII escapes keep lone surrogates and line separators of model text in one whole line.
        lines = [json.dumps(row, allow_nan=False) + "\n" for row in rows]
        self._file.write("".join(lines))
        self._file.flush()


def drop_rows_from(path: Path, step: int) -> None:
    """Drop the rows of `step` and later, and a line that a killed run left unfinished.

    One truncation: a reader, or another kill, finds the old file or the new one. A damaged line
    that others follow is no kill's, and an error: what follows is not to be lost.
    """
    if not path.exists():
        return
    earlier = [n for n, _ in takewhile(lambda line: line[1]["step"] < step, _lines(path))]
    with path.open("rb") as file:
        file.seek(sum(earlier))
        line = file.readline()
        if _row(line) is None and file.read(1):
            raise DataError(
                f"{path} is damaged: its line {len(earlier) + 1} is no row with a step, and others "
                "follow. Put the file back as it was, or take that line out"
            )
    os.truncate(path, sum(earlier))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics file, those of one step made one; what is not finite is read back."""
    by_step: dict[int, dict[str, float]] = {}
    for row in read_rows(path):
        numbers = {name: float(value) for name, value in row.items() if _is_number(value)}
        by_step.setdefault(row["step"], {}).update(numbers)
    return [row | {"step": step} for step, row in by_step.items()]


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, as far as they are whole; none if it is not there."""
    return (row for _, row in _lines(path)) if path.exists() else iter(())


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Length in bytes and content of each line, up to one that is not whole."""
    with path.open("rb") as file:
        for line in file:
            if (row := _row(line)) is None:
                return
            yield len(line), row


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    whole = line.endswith(b"\n") and isinstance(row, dict) and isinstance(row.get("step"), int)
    return row if whole else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) or value in _NOT_FINITE
