"""RunFiles: a sink that writes metrics and samples as JSON lines. Also reads these files."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, TextIO

from textpolicy.errors import DataError
from textpolicy.tracking.sink import SampleRow
from textpolicy.tracking.values import to_json_number
from textpolicy.types import Metrics

_NOT_FINITE = {"NaN", "Infinity", "-Infinity"}


class RunFiles:
    """Appends whole lines to the file `metrics`, and to the file `samples` if there is one.

    Rows of step `resume_step` and later steps are dropped first, because a resumed run writes them
    again. A new run drops all rows.
    """

    def __init__(self, metrics: Path, samples: Path | None = None, *, resume_step: int = 0) -> None:
        self._metrics = _open_to_append(metrics, resume_step)
        self._samples = _open_to_append(samples, resume_step) if samples else None

    def write(self, step: int, metrics: Metrics) -> None:
        """Append `metrics` as one line."""
        finite = {name: to_json_number(value) for name, value in metrics.items()}
        _append_rows(self._metrics, [{"step": step, **finite}])

    def write_samples(self, step: int, samples: Sequence[SampleRow]) -> None:
        """Append one line for each completion."""
        if self._samples:
            _append_rows(self._samples, samples)

    def close(self) -> None:
        """Close the files."""
        self._metrics.close()
        if self._samples:
            self._samples.close()


def _open_to_append(path: Path, resume_step: int) -> TextIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    drop_rows_from(path, resume_step)
    return path.open("a", encoding="utf-8")


def _append_rows(file: TextIO, rows: Sequence[Mapping[str, Any]]) -> None:
    # json.dumps escapes all but ASCII, so lone surrogates and line separators break no line.
    file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    file.flush()


def drop_rows_from(path: Path, step: int) -> None:
    """Drop the rows of `step` and later steps, and a last line that a killed run left unfinished.

    Raise `DataError` if rows follow a damaged line: a kill cannot do this, and truncating would
    lose the rows. One call truncates the file, so a kill leaves the old file or the new file.
    """
    if not path.exists():
        return
    kept = [size for size, _ in takewhile(lambda line: line[1]["step"] < step, _lines(path))]
    with path.open("rb") as file:
        file.seek(sum(kept))
        line = file.readline()
        if _parse_row(line) is None and file.read(1):
            raise DataError(
                f"{path} is damaged: its line {len(kept) + 1} is not a row with a step, but other "
                "rows follow. Restore the file, or delete this line"
            )
    os.truncate(path, sum(kept))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return one row a step from a metrics file. Rows of the same step are merged."""
    by_step: dict[int, dict[str, float]] = {}
    for row in read_rows(path):
        merged = by_step.setdefault(row["step"], {})
        for name, value in row.items():
            if isinstance(value, int | float) or value in _NOT_FINITE:
                merged[name] = float(value)
    return [row | {"step": step} for step, row in by_step.items()]


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file up to the first line that is not whole. No file has no rows."""
    return (row for _, row in _lines(path)) if path.exists() else iter(())


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the size in bytes and the row of each line, up to the first that is not whole."""
    with path.open("rb") as file:
        for line in file:
            if (row := _parse_row(line)) is None:
                return
            yield len(line), row


def _parse_row(line: bytes) -> dict[str, Any] | None:
    """Return the row, or None if the line is not a whole JSON object with a step."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    whole = line.endswith(b"\n") and isinstance(row, dict) and isinstance(row.get("step"), int)
    return row if whole else None
