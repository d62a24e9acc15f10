"""Rows of data from files. Errors name the file and the line."""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

from textpolicy.errors import DataError, UnreadableError
from textpolicy.untrusted.bounds import MAX_DATA_BYTES, MAX_LINE_CHARACTERS
from textpolicy.untrusted.files import read_utf8, shown_path
from textpolicy.untrusted.parsing import parse_json

DataRow = Mapping[str, Any]
"""One example: column names to values, for the prompt and for the reward function."""

_HUB = "hf:"


def load_rows(source: str | Path, *, split: str = "train") -> list[DataRow]:
    """Return the rows of a .jsonl, .csv or .parquet file, a `datasets` folder, or "hf:NAME".

    All formats but .jsonl and .csv need the extra `datasets`, and have splits to choose from.
    """
    return [row for _, row in load_rows_with_locations(source, split=split)]


def load_rows_with_locations(
    source: str | Path, *, split: str = "train"
) -> list[tuple[str, DataRow]]:
    """Return the rows that `load_rows` returns, each with its location for error messages."""
    path = Path(source)
    if str(source).startswith(_HUB) or path.suffix == ".parquet" or path.is_dir():
        numbered = enumerate(_read_huggingface(str(source), split), start=1)
        rows = [(f"{source}, row {number}", row) for number, row in numbered]
    elif path.suffix in _READERS:
        numbered = _READERS[path.suffix](read_text(path), str(source))
        rows = [(f"{source}, line {number}", row) for number, row in numbered]
    else:
        raise DataError(
            f"the format of {str(source)!r} is not known: expected a file ending in .jsonl, .csv "
            f"or .parquet, a folder saved by the datasets library, or {_HUB}NAME"
        )
    if not rows:
        raise DataError(f"{source} has no rows")
    return rows


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 file. Raise `DataError` with the line that is not UTF-8."""
    if not os.path.lexists(path):
        raise DataError(f"data file {shown_path(path)!r} does not exist (looked in {Path.cwd()})")
    try:
        return read_utf8(path, limit=MAX_DATA_BYTES)
    except UnreadableError as error:
        raise DataError(str(error)) from error


def _read_jsonl(text: str, name: str) -> Iterator[tuple[int, DataRow]]:
    # Not splitlines(), which would split a JSON string at an unescaped U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _json_row(line, f"{name}, line {number}")


def _json_row(line: str, where: str) -> DataRow:
    if len(line) > MAX_LINE_CHARACTERS:
        raise DataError(
            f"{where}: the line has {len(line):,} characters; expected at most "
            f"{MAX_LINE_CHARACTERS:,}"
        )
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


def _read_csv(text: str, name: str) -> Iterator[tuple[int, DataRow]]:
    reader = csv.reader(StringIO(text, newline=""), strict=True)
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


_READERS = {".jsonl": _read_jsonl, ".csv": _read_csv}


def _read_huggingface(source: str, split: str) -> list[DataRow]:
    try:
        datasets: Any = import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"reading {source!r} needs the datasets library: pip install 'textpolicy[datasets]'"
        ) from error
    try:
        if source.startswith(_HUB):
            data = datasets.load_dataset(source.removeprefix(_HUB), split=split)
        elif source.endswith(".parquet"):
            data = datasets.load_dataset("parquet", data_files=source, split="train")
        else:
            data = datasets.load_from_disk(source)
    except (OSError, ValueError, ConnectionError) as error:
        raise DataError(f"the datasets library cannot read {source!r}: {error}") from error
    if isinstance(data, Mapping):
        if split not in data:
            raise DataError(f"{source!r} has no split {split!r}; its splits are {sorted(data)}")
        data = data[split]
    return to_rows(data)


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
