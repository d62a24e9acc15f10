"""docs/reference has an entry for every public name, as the code describes it, and an example."""

import ast
import re
import runpy
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from tests.docs.test_docs import program

ROOT = Path(__file__).resolve().parents[2]
PAGES = {path.name: path.read_text("utf-8") for path in (ROOT / "docs" / "reference").glob("*.md")}
MARK = re.compile(r"^<!-- (textpolicy[\w.]*) -->$", re.MULTILINE)
# Packages whose names are for the library itself, or for few users and on a page of their own.
OTHERS = {
    "textpolicy.cli",
    "textpolicy.config",
    "textpolicy.export.card",
    "textpolicy.export.gguf",
    "textpolicy.fast_cpu",
    "textpolicy.layer_gradients",
    "textpolicy.user_code",
}


def packages() -> Iterator[str]:
    """Yield every package of the library that says which of its names are public."""
    for path in sorted((ROOT / "textpolicy").rglob("__init__.py")):
        module = ".".join(path.parent.relative_to(ROOT).parts)
        if "__all__" in path.read_text("utf-8"):
            yield module


def without_entry(module: str, marks: set[str]) -> set[str]:
    """Return the public names of a module that no page describes, under whichever module."""
    public = import_module(module)
    return {
        name
        for name in public.__all__
        if not any(
            mark.endswith(f".{name}") and found(mark) is getattr(public, name) for mark in marks
        )
    }


def found(mark: str) -> object:
    module, _, name = mark.rpartition(".")
    return getattr(import_module(module), name)


def without_example(page: str) -> set[str]:
    """Return the names that a page describes and does not use; an import is no use."""
    nodes = list(ast.walk(ast.parse(program(page))))
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    used |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return {mark.rpartition(".")[2] for mark in MARK.findall(page)} - used


@pytest.mark.parametrize("module", [name for name in packages() if name not in OTHERS])
def test_every_public_name_has_an_entry(module):
    marks = {mark for page in PAGES.values() for mark in MARK.findall(page)}
    assert without_entry(module, marks) == set()


@pytest.mark.parametrize("page", PAGES)
def test_every_entry_has_an_example(page):
    assert MARK.findall(PAGES[page])
    assert without_example(PAGES[page]) == set()


def test_a_missing_entry_and_a_missing_example_are_found():
    assert without_entry("textpolicy.runs", {"textpolicy.runs.RunDirectory"}) == {
        *("NamedAdapter", "find_adapter", "new_directory", "read_named_adapter")
    }
    page = "<!-- textpolicy.run -->\n```python\nfrom textpolicy import run\n```\n"
    assert without_example(page) == {"run"}
    assert without_example(page.replace("import run\n", "import run\nrun()\n")) == set()


@pytest.mark.parametrize("page", PAGES)
def test_a_page_says_what_the_code_says(page):
    tool = runpy.run_path(str(ROOT / "tools" / "reference_pages.py"))
    assert PAGES[page] == tool["written"](PAGES[page]), "run python tools/reference_pages.py"


def test_pages_and_packages_that_are_left_out_exist():
    assert set(packages()) > OTHERS
