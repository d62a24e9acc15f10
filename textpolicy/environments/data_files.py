"""Rows of data from files: a mapping of columns each, and whatever is wrong named by its line."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

from textpolicy.errors import DataError

DataRow = Mapping[str, Any]
"""One example: what the prompt is made from, and what the reward needs."""

_LONGEST_LINE = 16 * 2**20
_HUB = "hf:"


def load_rows(source: str | Path, *, split: str = "train") -> list[DataRow]:
    """The rows of a .jsonl, .csv or .parquet file, a folder saved by `datasets`, or "hf:NAME".

    The last three need the extra `datasets`; `split` chooses among the splits that they have.
    """
    return [row for _, row in load_rows_with_locations(source, split=split)]


def load_rows_with_locations(
    source: str | Path, *, split: str = "train"
) -> list[tuple[str, DataRow]]:
    """What `load_rows` reads, each row with the place that a message about it names."""
    path = Path(source)
    if str(source).startswith(_HUB) or path.suffix == ".parquet" or path.is_dir():
        found = enumerate(_read_huggingface(str(source), split), start=1)
        rows = [(f"{source}, row {number}", row) for number, row in found]
    elif path.suffix in _READERS:
        found = _READERS[path.suffix](read_text(path), str(source))
        rows = [(f"{source}, line {number}", row) for number, row in found]
    else:
        raise DataError(
            f"cannot tell how to read {str(source)!r}: expected a file ending in .jsonl, .csv or "
            f".parquet, a folder saved by the datasets library, or {_HUB}NAME"
        )
    if not rows:
        raise DataError(f"{source} has no rows")
    return rows


def columns_of(rows: Iterable[DataRow]) -> list[str]:
    """The columns that every row has, in the first row's order."""
    first, *others = rows
    return [column for column in first if all(column in row for row in others)]


def read_text(path: Path) -> str:
    """The content of a file that is UTF-8; an error with the line that is not."""
    if not path.is_file():
        raise DataError(f"data file {str(path)!r} does not exist (looked in {Path.cwd()})")
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 ({error.reason})") from error


def _jsonl(text: str, name: str) -> Iterator[tuple[int, DataRow]]:
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _json_row(line, f"{name}, line {number}")


def _json_row(line: str, where: str) -> DataRow:
    if len(line) > _LONGEST_LINE:
        raise DataError(f"{where}: {len(line):,} characters; at most {_LONGEST_LINE:,} are read")
    try:
        row = json.loads(line, parse_constant=_refuse_constant)
        # What cannot be encoded cannot be tokenized: half a surrogate pair.
        json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a row of JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: a {type(row).__name__}; expected an object, such as "
            '{"prompt": "2+2=", "answer": "4"}'
        )
    return row


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _csv(text: str, name: str) -> Iterator[tuple[int, DataRow]]:
    reader = csv.reader(StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        if not all(header) or len(set(header)) < len(header):
            raise DataError(
                f"{name}, line 1: columns {header}; expected different names, none empty"
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


_READERS = {".jsonl": _jsonl, ".csv": _csv}


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
            raise DataError(f"{source!r} has no split {split!r}; it has {sorted(data)}")
        data = data[split]
    return to_rows(data)


def to_rows(data: Iterable[Any]) -> list[DataRow]:
    """Rows from a list of mappings, or from a dataset of the `datasets` library."""
    rows: list[DataRow] = []
    for number, row in enumerate(data, start=1):
        if not isinstance(row, Mapping):
            raise DataError(f"row {number} is {row!r:.60}; expected a mapping from column to value")
        rows.append(row)
    if not rows:
        raise DataError("there are no rows")
    return rows


def check_column(column: str, rows: Sequence[DataRow]) -> None:
    """Raise `DataError` naming the first row that lacks the column, and what it has."""
    for number, row in enumerate(rows, start=1):
        if column not in row:
            raise DataError(f"row {number} has no column {column!r}; it has {list(row)}")
