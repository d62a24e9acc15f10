"""docs/errors.md has every error class with cause, cure and a message that is really produced."""

import ast
import importlib
import io
import re
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "errors.md").read_text("utf-8")
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
FENCE = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SOURCES = sorted((ROOT / "textpolicy").rglob("*.py"))


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text("utf-8"))))


@pytest.fixture(scope="module")
def errors() -> dict[str, type]:
    """Return every public error class of the package by name. A class may be in any file.

    A class that the section of its base names is described there.
    """
    classes = {
        node.name: (path, {ast.unparse(base) for base in node.bases})
        for path in SOURCES
        for node in nodes_of(path)
        if isinstance(node, ast.ClassDef)
    }
    found = {"TextPolicyError"}
    while more := {name for name, (_, bases) in classes.items() if bases & found} - found:
        found |= more
    public = {name for name in found if not name.startswith("_")} - {"TextPolicyError"}
    for name in public - SECTIONS.keys():
        public -= {name for base in classes[name][1] if f"`{name}`" in SECTIONS.get(base, "")}
    return {name: getattr(module_of(classes[name][0]), name) for name in public}


def module_of(path: Path) -> ModuleType:
    return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


def test_every_error_class_is_on_the_page_with_its_cause_and_its_cure(errors):
    assert SECTIONS.keys() == errors.keys()
    for name, text in SECTIONS.items():
        cause, cure = (re.search(rf"\*\*{word}\.\*\* (.+)", text) for word in ("Cause", "Cure"))
        assert cause and cure and cause.start() < cure.start(), name


def test_the_table_names_the_other_base_of_each_class(errors):
    rows = re.findall(r"^\| \[`(\w+)`\]\(#(\w+)\) \| `(\w+)` \|", PAGE, re.MULTILINE)
    assert {name for name, _, _ in rows} == errors.keys()
    for name, anchor, base in rows:
        assert anchor == name.lower()
        assert base in [one.__name__ for one in errors[name].__mro__[1:]]


def names_raised(path: Path) -> set[str]:
    """Return the classes that a file raises, or names for others to raise."""
    found = set[str]()
    for node in nodes_of(path):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            found.add(ast.unparse(node.exc.func))
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.Call):
            # A helper that returns the error, which its callers raise.
            found.add(ast.unparse(node.value.func))
    return found


def test_every_error_class_is_raised_somewhere(errors):
    raised = set[str]().union(*map(names_raised, SOURCES))
    assert errors.keys() <= raised
    # Every message is of a class that says what was wrong.
    assert "TextPolicyError" not in raised


def quoted() -> list[tuple[str, str, str]]:
    """Return the section, the program and the quoted message of each example, in order."""
    return [
        (name, code, message)
        for name, text in SECTIONS.items()
        for code, message in [[body for _, body in FENCE.findall(text)]]
    ]


@pytest.mark.slow
def test_every_message_on_the_page_is_produced_by_the_example_above_it(
    errors, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(FENCE.search(PAGE)[2], names)
    for section, code, message in quoted():
        # The class that the section is about is the class that its example raises.
        caught = f"{code}    assert type(error).__name__ == {section!r}, type(error)\n"
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(caught, names)
        assert printed.getvalue() == message, section


def test_every_section_has_one_example_and_its_message():
    assert [name for name, _, _ in quoted()] == list(SECTIONS)
    assert all(code.rstrip().splitlines()[-2].startswith("except Text") for _, code, _ in quoted())
