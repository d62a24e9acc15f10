"""A Python file of the user is loaded by its path, without a package and without side effects."""

import json
import os
import sys
from pathlib import Path

import pytest

from textpolicy.errors import ConfigError, RewardError, TaskError
from textpolicy.user_code import (
    keep_working_directory,
    load_beside_run,
    load_python_file,
    split_file_and_name,
)


@pytest.fixture
def load(tmp_path, monkeypatch):
    """A function that writes a Python file with this source and returns its module."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write_and_load(source, name="mine.py"):
        (tmp_path / name).write_text(source)
        return load_python_file(tmp_path / name, what="environment", error=TaskError)

    return write_and_load


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mine.py", (Path("mine.py"), "")),
        ("folder/mine.py:score", (Path("folder/mine.py"), "score")),
        ("a:b.py:score", (Path("a:b.py"), "score")),
        ("mine", None),
        ("mine:score", None),
        ("gymnasium:CartPole-v1", None),
    ],
)
def test_a_text_names_a_python_file_or_none(text, expected):
    assert split_file_and_name(text) == expected


def test_a_file_may_define_a_dataclass_with_postponed_annotations(load):
    module = load(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Answer:\n    value: float\n"
    )
    assert module.Answer(0.5).value == 0.5


def test_a_file_can_import_the_files_beside_it_at_once_and_later(load, tmp_path):
    (tmp_path / "neighbour_now.py").write_text("half = 0.5\n")
    (tmp_path / "neighbour_later.py").write_text("half = 0.5\n")
    module = load(
        "from neighbour_now import half\n"
        "def both():\n    import neighbour_later\n    return half + neighbour_later.half\n"
    )
    assert module.both() == 1.0


def test_a_file_named_like_a_known_module_does_not_replace_the_module(load):
    load("value = 1\n", name="json.py")
    assert sys.modules["json"] is json


def test_an_error_in_the_file_is_the_callers_error_and_names_the_line(load):
    with pytest.raises(TaskError, match=r"importing .*mine\.py raised ZeroDivisionError.*line 2"):
        load("\n1 / 0\n")


def test_keyboard_interrupts_pass_through(load):
    with pytest.raises(KeyboardInterrupt):
        load("raise KeyboardInterrupt")


def test_a_missing_file_is_an_error_with_the_folder_that_was_searched(tmp_path):
    with pytest.raises(ConfigError, match=r"environment file .* does not exist"):
        load_python_file(tmp_path / "none.py", what="environment", error=TaskError)


def test_the_path_of_a_file_begins_where_the_run_is_and_not_where_earlier_code_has_gone(
    tmp_path, monkeypatch
):
    home, gone_to = tmp_path / "home", tmp_path / "gone_to"
    home.mkdir()
    gone_to.mkdir()
    (home / "mine.py").write_text("import os\nHERE = os.getcwd()\n")
    monkeypatch.chdir(home)
    monkeypatch.setattr(keep_working_directory, "users", str(gone_to))
    module = load_beside_run(Path("mine.py"), what="reward", error=RewardError)
    assert (module.HERE, os.getcwd()) == (str(gone_to), str(home))
