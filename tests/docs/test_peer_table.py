"""The table beside other libraries is the one of its cells, and the cells about this library hold.

`python tools/peer_table.py` checks the cells about the others, for which it downloads their wheels.
"""

from zipfile import ZipFile

import pytest

from textpolicy.config import ALGORITHMS
from tools.peer_table import (
    ROOT,
    TABLE,
    fault_of,
    faults_of,
    files_of,
    own_files,
    table_lines,
    with_table,
)

ROWS = {row["question"]: row for row in TABLE["rows"]}


def test_the_page_has_the_table_of_the_cells():
    page = (ROOT / "README.md").read_text("utf-8")
    assert page == with_table(page), "run python tools/peer_table.py --page README.md"


def test_every_cell_about_this_library_is_shown_by_its_files():
    assert faults_of("textpolicy", own_files()) == []


def test_the_number_of_losses_is_that_of_the_algorithms():
    assert ROWS["losses by name"]["textpolicy"]["is"] == str(len(ALGORITHMS))


def test_every_row_has_a_cell_of_each_library_that_says_what_shows_it():
    for row in TABLE["rows"]:
        assert row.keys() - {"question"} == TABLE["libraries"].keys()
        for library in TABLE["libraries"]:
            assert {"nowhere"} <= row[library].keys() or {"file"} < row[library].keys() - {"is"}


@pytest.fixture
def files(tmp_path):
    """Return the files of a wheel with two modules and a test."""
    wheel = tmp_path / "other-1.0-py3-none-any.whl"
    with ZipFile(wheel, "w") as archive:
        archive.writestr("other/losses.py", 'if loss == "a":\nelif loss in ["b", "c"]:\n')
        archive.writestr("other/tests/test_gguf.py", "gguf = 1")
        archive.writestr("other/logo.png", b"\x89")
    return files_of([wheel])


@pytest.mark.parametrize(
    ("cell", "fault"),
    [
        ({"file": "other/losses.py", "text": "loss in"}, None),
        ({"file": "other/losses.py", "text": "loss at"}, "other/losses.py lacks 'loss at'"),
        ({"file": "other/gone.py", "text": "loss"}, "there is no file other/gone.py"),
        ({"nowhere": "gguf"}, None),
        ({"nowhere": "elif"}, "other/losses.py has 'elif'"),
    ],
)
def test_a_cell_holds_only_if_the_files_show_it(files, cell, fault):
    assert fault_of({"is": "yes", **cell}, files) == fault


@pytest.mark.parametrize(
    ("number", "fault"), [("3", None), ("4", "other/losses.py has 3: a, b, c")]
)
def test_a_number_is_that_of_the_words_in_the_lines(files, number, fault):
    cell = {"file": "other/losses.py", "lines": r"loss (?:==|in) .*", "words": r'"(\w+)"'}
    assert fault_of({"is": number, **cell}, files) == fault


def test_a_page_without_marks_is_refused():
    with pytest.raises(SystemExit, match="the page has no <!-- peers -->"):
        with_table("# A page\n")
    page = with_table("# A page\n<!-- peers -->\nold\n<!-- end of peers -->\n")
    assert "\n".join(table_lines()) in page
    assert "old" not in page
