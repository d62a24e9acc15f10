"""RunFiles: a sink that writes metrics and samples as JSON lines. Also reads these files."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from textpolicy.file_writing import (
    atomic_replace,
    flush_to_disk,
    make_private_folder,
    open_private,
)
from textpolicy.tracking.sink import SampleRow
from textpolicy.tracking.values import to_json_number
from textpolicy.types import Metrics
from textpolicy.untrusted.bounds import MAX_ROW_BYTES, MAX_STEP
from textpolicy.untrusted.parsing import parse_json

_NOT_FINITE = {"NaN", "Infinity", "-Infinity"}


class RunFiles:
    """Appends whole lines to the file `metrics`, and to the file `samples` if there is one.

    Rows of step `resume_step` and later steps are dropped first, because a resumed run writes them
    again. A new run drops all rows. When `close` returns, the disk has all rows.
    """

    def __init__(self, metrics: Path, samples: Path | None = None, *, resume_step: int = 0) -> None:
        self.damage: list[str] = []
        """What could not be read in the files, for people."""
        self._metrics = self._open_to_append(metrics, resume_step)
        self._samples = self._open_to_append(samples, resume_step) if samples else None

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
        for file in filter(None, (self._metrics, self._samples)):
            os.fsync(file.fileno())
            file.close()

    def _open_to_append(self, path: Path, resume_step: int) -> TextIO:
        make_private_folder(path.parent)
        if path.exists() and path.stat().st_nlink > 1:
            # The other name may be a backup.
            with atomic_replace(path, private=True) as temporary:
                shutil.copyfile(path, temporary)
        if damage := drop_rows_from(path, resume_step):
            self.damage.append(damage)
        descriptor = open_private(path, os.O_WRONLY | os.O_APPEND)
        file = os.fdopen(descriptor, "a", encoding="utf-8")
        flush_to_disk(path.parent)
        return file


def _append_rows(file: TextIO, rows: Sequence[Mapping[str, Any]]) -> None:
    # json.dumps escapes all but ASCII, so lone surrogates and line separators break no line.
    file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    file.flush()


def drop_rows_from(path: Path, step: int) -> str | None:
    """Drop the rows of `step` and later steps, and lines that are not whole rows.

    Return what was damaged, for people, or None. A kill can cut off the last line; other damage
    leaves a copy of the file as it was. A kill of this process leaves the old or the new file.
    """
    if not path.exists():
        return None
    size, cut, rows_after = 0, False, False
    for line, row in _lines(path):
        kept = row is not None and row["step"] < step
        cut = cut or not kept
        rows_after = rows_after or (cut and kept)
        size += 0 if cut else len(line)
    if not rows_after:
        os.truncate(path, size)
        return None
    damaged = path.with_name(f"{path.stem}.damaged{path.suffix}")
    with atomic_replace(damaged, private=True) as temporary:
        shutil.copyfile(path, temporary)
    with atomic_replace(path, private=True) as temporary, temporary.open("wb") as file:
        file.writelines(
            line for line, row in _lines(damaged) if row is not None and row["step"] < step
        )
    return (
        f"{path} was damaged: it had lines between its rows that cannot be read. They are removed, "
        f"and the file as it was is {damaged}"
    )


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return one row a step from a metrics file. Rows of the same step are merged."""
    by_step: dict[int, dict[str, float]] = {}
    for row in read_rows(path):
        merged = by_step.setdefault(row["step"], {})
        for name, value in row.items():
            if (number := _to_float(value)) is not None:
                merged[name] = number
    return [row | {"step": step} for step, row in by_step.items()]


def _to_float(value: Any) -> float | None:
    """Return a number of a row as a float, or None for any other value."""
    named = isinstance(value, str) and value in _NOT_FINITE
    try:
        return float(value) if named or isinstance(value, int | float) else None
    except OverflowError:
        return None


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file, without lines that cannot be read. No file has no rows."""
    # Opening a named pipe would wait for a writer.
    return (row for _, row in _lines(path) if row is not None) if path.is_file() else iter(())


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yield each line with its row, or with None if the line is not a whole row.

    A line that is too long comes in parts, none of which is a row.
    """
    with path.open("rb") as file:
        begins = True
        while line := file.readline(MAX_ROW_BYTES):
            ends = line.endswith(b"\n")
            yield line, _parse_row(line) if begins and ends else None
            begins = ends


def _parse_row(line: bytes) -> dict[str, Any] | None:
    """Return the row, or None if the line is not a JSON object with the number of a step."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    step = row.get("step")
    return row if type(step) is int and abs(step) <= MAX_STEP else None
