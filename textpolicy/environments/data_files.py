"""Rows of data from files, folders and the hub. Errors name the file and the line."""

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Any

from textpolicy.environments.data_address import HUB, DataAddress
from textpolicy.environments.public_layouts import open_split
from textpolicy.errors import DataError, UnreadableError
from textpolicy.untrusted.bounds import MAX_DATA_BYTES
from textpolicy.untrusted.files import read_utf8, shown_path, utf8_lines
from textpolicy.untrusted.parsing import parse_json

DataRow = Mapping[str, Any]
"""One example: column names to values, for the prompt and for the reward function."""

LocatedRow = tuple[str, DataRow]
"""A row with its location for error messages."""


def load_rows(source: str | Path, *, split: str = "train") -> list[DataRow]:
    """Return the rows of a .jsonl, .csv or .parquet file, of a folder, or of "hf:OWNER/NAME".

    The files may end in .gz, but not those of parquet. An address of a folder or of the hub may
    name a configuration and a split, as in "hf:openai/gsm8k:main:test"; `split` is the one to read
    if the address names none. Folders, .parquet and hf: need the extra `datasets`.
    """
    return [row for _, row in load_rows_with_locations(source, split=split)]


def load_rows_with_locations(
    source: str | Path, *, split: str | None = "train"
) -> list[LocatedRow]:
    """Return the rows that `load_rows` returns, each with its location for error messages.

    With `split` None, an address without a split is refused if there are several splits.
    """
    rows = list(iterate_rows(source, split=split, limit=MAX_DATA_BYTES))
    if not rows:
        raise DataError(f"{source} has no rows")
    return rows


def iterate_rows(
    source: str | Path, *, split: str | None = "train", limit: int | None = None
) -> Iterator[LocatedRow]:
    """Yield the rows of `load_rows_with_locations` as they are read; only a few are in memory.

    A text file with more than `limit` bytes is refused.
    """
    address = DataAddress.parse(source)
    path = Path(address.place).expanduser()
    if address.on_hub or path.is_dir() or path.suffix == ".parquet":
        yield from open_split(address, split, stream=limit is None)
        return
    reader = _READERS.get(path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix)
    if reader is None:
        raise DataError(
            f"the format of {str(source)!r} is not known: expected a file ending in .jsonl, .csv "
            "(also with .gz behind) or .parquet, a folder that the datasets library can read, or "
            f"{HUB}OWNER/NAME[:CONFIG][:SPLIT]"
        )
    _check_exists(path)
    try:
        for number, row in reader(utf8_lines(path, limit=limit), str(source)):
            yield f"{source}, line {number}", row
    except UnreadableError as error:
        raise DataError(str(error)) from error


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 file. Raise `DataError` with the line that is not UTF-8."""
    _check_exists(path)
    try:
        return read_utf8(path, limit=MAX_DATA_BYTES)
    except UnreadableError as error:
        raise DataError(str(error)) from error


def _check_exists(path: Path) -> None:
    if not os.path.lexists(path):
        raise DataError(f"data file {shown_path(path)!r} does not exist (looked in {Path.cwd()})")


def _read_jsonl(lines: Iterable[str], name: str) -> Iterator[tuple[int, DataRow]]:
    # Not str.splitlines(), which would split a JSON string at an unescaped U+2028.
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, _json_row(line, f"{name}, line {number}")


def _json_row(line: str, where: str) -> DataRow:
    try:
        row = parse_json(line)
        # Text with half a surrogate pair cannot be encoded, so it cannot be tokenized.
        json.dumps(row, ensure_ascii=False).encode()
    except ValueError as error:
        raise DataError(f"{where}: not a row of JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: a {type(row).__name__}; expected an object, such as "
            '{"prompt": "2+2=", "answer": "4"}'
        )
    return row


def _read_csv(lines: Iterable[str], name: str) -> Iterator[tuple[int, DataRow]]:
    # A line that ends at \n may hold the ends \r of several lines.
    pieces = chain.from_iterable(StringIO(line, newline="") for line in lines)
    reader = csv.reader(pieces, strict=True)
    try:
        header = next(reader, [])
        if not all(header) or len(set(header)) < len(header):
            raise DataError(
                f"{name}, line 1: the columns are {header}; expected different names, none empty"
            )
        for cells in reader:
            if cells and len(cells) != len(header):
                raise DataError(
                    f"{name}, line {reader.line_num}: {len(cells)} cells; "
                    f"expected {len(header)}, one for each of {header}"
                )
            if cells:
                yield reader.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{name}, line {reader.line_num}: not CSV ({error})") from error


_READERS: dict[str, Callable[[Iterable[str], str], Iterator[tuple[int, DataRow]]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
}


def to_rows(data: Iterable[Any]) -> list[DataRow]:
    """Return the rows of a list of mappings, or of a dataset of the `datasets` library."""
    rows: list[DataRow] = []
    for number, row in enumerate(data, start=1):
        if not isinstance(row, Mapping):
            raise DataError(f"row {number} is {row!r:.60}; expected a mapping from column to value")
        rows.append(row)
    if not rows:
        raise DataError("there are no rows")
    return rows
