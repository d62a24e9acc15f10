"""Data files: any bytes give rows or a DataError that names the file, and rows are read back."""

import csv
import json
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import JSON_LIKE, like
from textpolicy.environments.data_files import load_rows, load_rows_with_locations
from textpolicy.errors import DataError

CSV_LIKE = like(*"\"',;\r\n\t\0ab", '""', "a,b\n", '"a\nb"', "\r\n", "\ufeff")
CONTENTS = st.binary(max_size=80) | (JSON_LIKE | CSV_LIKE).map(
    lambda text: text.encode(errors="surrogatepass")
)
# Text that UTF-8 can hold; a row with any other text is refused.
ENCODABLE = st.text(st.characters(codec="utf-8"), max_size=12)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | ENCODABLE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ENCODABLE, inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(ENCODABLE, VALUES, max_size=4), min_size=1, max_size=5)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@given(content=CONTENTS)
def test_any_bytes_give_rows_or_an_error_that_names_the_file(tmp_path: Path, suffix, content):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    try:
        rows = load_rows(path)
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert rows and all(isinstance(row, dict) for row in rows)


@given(ROWS, st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n", "\n \n"]), st.booleans())
def test_rows_of_jsonl_are_read_back_with_their_lines(tmp_path: Path, rows, ascii, end, mark):
    text = "".join(json.dumps(row, ensure_ascii=ascii) + end for row in rows)
    path = tmp_path / "rows.jsonl"
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + text.encode())
    lines = end.count("\n")
    found = load_rows_with_locations(path)
    assert found == [(f"{path}, line {1 + lines * i}", row) for i, row in enumerate(rows)]


@given(st.data(), st.lists(ENCODABLE.filter(bool), min_size=1, max_size=4, unique=True))
def test_rows_of_csv_are_read_back(tmp_path: Path, data: st.DataObject, header):
    cells = st.lists(ENCODABLE, min_size=len(header), max_size=len(header))
    rows = data.draw(st.lists(cells, min_size=1, max_size=4))
    written = StringIO(newline="")
    quoting = data.draw(st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]))
    csv.writer(written, quoting=quoting).writerows([header, *rows])
    # A byte-order mark at the start of a file is not part of its text.
    text = "\ufeff" + written.getvalue()
    path = tmp_path / "rows.csv"
    path.write_bytes(text.encode())
    assert load_rows(path) == [dict(zip(header, row, strict=True)) for row in rows]
