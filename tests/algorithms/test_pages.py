"""The pages and tables of the algorithms are what the tool writes from the code."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "algorithm_pages.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_committed_pages_are_what_the_tool_writes():
    result = run_tool("--check")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_a_page_or_table_that_differs_is_noticed_and_repaired(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(DOCS / "algorithms.md", docs)
    shutil.copytree(DOCS / "algorithms", docs / "algorithms")
    overview, edited, missing, extra = (
        docs / name
        for name in ("algorithms.md", "algorithms/grpo.md", "algorithms/dapo.md", "algorithms/x.md")
    )
    row = "| [`grpo`](algorithms/grpo.md)"
    overview.write_text(overview.read_text().replace(row, "| [`old`](algorithms/grpo.md)"))
    edited.write_text(edited.read_text().replace("0.2", "0.3"))
    missing.unlink()
    extra.write_text("# x\n")
    result = run_tool("--check", "--docs", str(docs))
    assert result.returncode == 1
    for page in (overview, edited, missing, extra):
        assert str(page.relative_to(docs)) in result.stdout
    assert run_tool("--docs", str(docs)).returncode == 0
    assert overview.read_text() == (DOCS / "algorithms.md").read_text()
    assert {p.name: p.read_text() for p in (docs / "algorithms").iterdir()} == {
        p.name: p.read_text() for p in (DOCS / "algorithms").iterdir()
    }


def test_a_page_without_a_place_for_the_tables_is_refused(tmp_path):
    (tmp_path / "algorithms.md").write_text("# Algorithms\n")
    result = run_tool("--docs", str(tmp_path))
    assert result.returncode == 1 and "has no line" in result.stderr


@pytest.mark.parametrize("marker", ["algorithms: written by", "names: written by"])
def test_the_overview_holds_both_tables(marker):
    assert marker in (DOCS / "algorithms.md").read_text()
