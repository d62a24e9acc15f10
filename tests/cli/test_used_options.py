"""Every option of every command is used by a test.

This file reads the tests and runs none of them. The reach of a test is its own code, and the code
of the fixtures, functions and constants that it names, directly or indirectly, of its file and of
every conftest.py that pytest loads for its file. A test
uses an option if the name of the command and a flag of the option are within its reach. An option
of a run may also be a setting of the run's config.
"""

import argparse
import ast
import itertools
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from textpolicy.cli.parser import COMMANDS, build_parser, commands_of
from textpolicy.config import SFTConfig, TrainConfig

TESTS = Path(__file__).parents[1]
CONFIGS = {"train": TrainConfig, "sft": SFTConfig}


def definitions(page: ast.Module) -> dict[str, ast.stmt]:
    """Return the top-level definitions of a file by name."""
    named: dict[str, ast.stmt] = {}
    for statement in page.body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            named[statement.name] = statement
        if isinstance(statement, ast.Assign):
            named |= {t.id: statement for t in statement.targets if isinstance(t, ast.Name)}
    return named


def reach(test: str, named: dict[str, ast.stmt]) -> Iterator[ast.AST]:
    """Yield every syntax node within the reach of a test."""
    seen, following = {test}, [test]
    while following:
        for node in ast.walk(named[following.pop()]):
            yield node
            name = node.id if isinstance(node, ast.Name) else getattr(node, "arg", None)
            if name in named and name not in seen:
                seen.add(name)
                following.append(name)


def words_of(node: ast.AST) -> Iterator[str]:
    """Yield the texts, names and keywords of a node; `trainer__lr` is the setting `trainer.lr`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value.partition("=")[0] if node.value.startswith("--") else node.value
    elif isinstance(node, ast.Name):
        yield node.id
    elif isinstance(node, ast.keyword) and node.arg:
        yield node.arg.replace("__", ".")


def places_of(node: ast.AST) -> Iterator[str]:
    """Yield the names of commands that are followed by an argument other than a flag."""
    row = node.args if isinstance(node, ast.Call) else getattr(node, "elts", [])
    for first, second in itertools.pairwise(row):
        said = second.value if isinstance(second, ast.Constant) else ""
        if isinstance(first, ast.Constant) and not str(said).startswith("-"):
            yield f"{first.value} ..."


def fixtures_for(path: Path) -> dict[str, ast.stmt]:
    """Return the top-level definitions of the conftest.py files that pytest loads for a file."""
    named: dict[str, ast.stmt] = {}
    for folder in reversed(path.relative_to(TESTS.parent).parents):
        conftest = TESTS.parent / folder / "conftest.py"
        if conftest.exists():
            named |= definitions(ast.parse(conftest.read_text()))
    return named


def words_of_tests(
    page: ast.Module, fixtures: dict[str, ast.stmt] | None = None
) -> Iterator[frozenset[str]]:
    own = definitions(page)
    named = (fixtures or {}) | own
    for test in own:
        if test.startswith("test_"):
            nodes = list(reach(test, named))
            yield frozenset(word for node in nodes for word in (*words_of(node), *places_of(node)))


@cache
def words_within_reach() -> list[frozenset[str]]:
    """Return the words within the reach of each test."""
    return [
        words
        for path in sorted(TESTS.rglob("test_*.py"))
        if path != Path(__file__)
        for words in words_of_tests(ast.parse(path.read_text()), fixtures_for(path))
    ]


def uses(command: str, option: argparse.Action) -> Iterator[set[str]]:
    """Yield sets of words. A test uses the option if all words of one set are within its reach."""
    for flag in option.option_strings or ["..."]:
        yield {command, flag} if option.option_strings else {f"{command} {flag}"}
    if command in CONFIGS:
        yield {CONFIGS[command].__name__, option.dest}


def options_of(command: str) -> list[argparse.Action]:
    parser = commands_of(build_parser(command))[command]
    return [option for option in parser._actions if option.dest != "help"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_used_by_a_test(command):
    unused = [
        option.option_strings or option.dest
        for option in options_of(command)
        if not any(use <= said for use in uses(command, option) for said in words_within_reach())
    ]
    assert not unused


def test_a_test_does_not_use_options_outside_its_reach():
    page = """
SMALL = ["train", "--env", "add"]
def test_one(): main([*SMALL, "--lr=1"])
def test_other(): assembled(trainer__lr=TrainConfig)
def test_third(): main("runs", folder)
def test_fourth(): main("runs", "--json")
"""
    one, other, third, fourth = words_of_tests(ast.parse(page))
    assert {"train", "--env", "--lr"} <= one and "trainer.lr" not in one
    assert {"TrainConfig", "trainer.lr"} <= other and "--lr" not in other
    assert "runs ..." in third and "runs ..." not in fourth


def test_a_fixture_of_a_conftest_is_within_reach():
    fixtures = ast.parse('def answer(capsys): return main([*argv, "--json"])')
    page = ast.parse('def test_one(answer): answer("doctor")\ndef test_other(): main("doctor")')
    one, other = words_of_tests(page, definitions(fixtures))
    assert "--json" in one and "--json" not in other
