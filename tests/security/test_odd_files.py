"""Odd files in every place where a file may be named: an error in bounded time, no traceback."""

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.faults.attempts import Attempts
from textpolicy.adapters import AdapterConfig
from textpolicy.adapters.config.model_layout import read_model_layout
from textpolicy.cli import main
from textpolicy.errors import TextPolicyError, UnreadableError
from textpolicy.generation.mlx_generation import load_model
from textpolicy.untrusted.parsing import parse_json, parse_toml, read_json_file

LONG = "n" * 300


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)  # The whole path may be too long for a socket.


ODD: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a link to itself": lambda path: path.symlink_to(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a socket": a_socket,
    "nothing": lambda path: None,
    "an empty file": lambda path: path.touch(),
    "zeros": lambda path: path.write_bytes(bytes(10_000)),
    "latin-1": lambda path: path.write_bytes(b"\xe9\xff\xfe"),
    "deep lists": lambda path: path.write_text("[" * 100_000),
    "deep lists that end": lambda path: path.write_text("[" * 500 + "]" * 500),
    "deep tables": lambda path: path.write_text('{"a":' * 900 + "1" + "}" * 900),
    "TOML of deep lists": lambda path: path.write_text("a = " + "[" * 50_000),
    "TOML of dotted keys": lambda path: path.write_text("a." * 100_000 + "a = 1"),
    "TOML of a deep table": lambda path: path.write_text("[" + "a." * 500 + "a]"),
    "a long number": lambda path: path.write_text("9" * 10_000),
    "NaN": lambda path: path.write_text('{"a": NaN}'),
}
PLACES = {
    "adapter": ["generate", "--prompt", "x", "--adapter", "odd.safetensors"],
    "inspected": ["inspect", "odd.safetensors"],
    "config": ["train", "--config", "odd.toml", "--dry-run"],
    "rows": ["train", "--data", "odd.jsonl", "--reward", "reward.py", "--dry-run"],
    "csv": ["train", "--data", "odd.csv", "--reward", "reward.py", "--dry-run"],
    "demonstrations": ["sft", "--data", "odd.jsonl", "--output", "run"],
    "reward": ["check", "odd.py", "--env", "add"],
    "environment": ["envs", "odd.py"],
    "run": ["report", "odd"],
    "adapter config": ["plan", "--adapter-config", "odd.json"],
}


@pytest.mark.slow
@pytest.mark.proves("F19")
@pytest.mark.parametrize("place", PLACES)
def test_an_odd_file_is_an_error_in_any_place(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, attempts: Attempts
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("reward.py").write_text("def reward(completion):\n    return 1.0\n")
    name = next(word for word in PLACES[place] if word.startswith("odd"))
    for kind, make in ODD.items():
        make(Path(name))
        started = time.monotonic()
        assert main(PLACES[place]) in (1, 2), kind
        assert time.monotonic() - started < 20, kind
        message = capsys.readouterr().err
        assert "Traceback" not in message and len(message) > 20
        attempts.add()
        if Path(name).is_dir():
            Path(name).rmdir()
        else:
            Path(name).unlink(missing_ok=True)


@pytest.mark.proves("F19")
@pytest.mark.parametrize("place", PLACES)
def test_a_name_that_no_file_can_have_is_an_error_in_any_place(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, attempts: Attempts
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("reward.py").write_text("def reward(completion):\n    return 1.0\n")
    assert main([word.replace("odd", LONG) for word in PLACES[place]]) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err
    attempts.add()


@pytest.mark.parametrize("text", ["[" * 65 + "]" * 65, '{"a":' * 65 + "1" + "}" * 65, "[" * 10**5])
def test_json_that_is_nested_too_deep_is_refused_and_less_is_read(text: str) -> None:
    with pytest.raises(ValueError, match="nested more than 64 deep"):
        parse_json(text)
    assert parse_json("[" * 60 + "]" * 60)
    assert len(parse_json(json.dumps([[]] * 1000))) == 1000


@pytest.mark.parametrize("text", ["NaN", "[1e999]", "-Infinity", "9" * 5000, '"\\ud800', ""])
def test_what_is_no_json_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


def test_toml_that_would_take_quadratic_time_is_refused_at_once() -> None:
    started = time.monotonic()
    for text in ("a." * 50_000 + "a = 1", "x = " + "[" * 50_000, "[" + "a." * 500 + "a]"):
        with pytest.raises(ValueError):
            parse_toml(text)
    assert time.monotonic() - started < 5


def test_a_file_that_is_larger_than_its_bound_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(2**34)
    with pytest.raises(UnreadableError, match="more than 16,777,216 bytes"):
        read_json_file(path)


PATTERNS = [
    *("(a+)+$", "(.*)*x", "(?:(?:.+)+)+\\.zzz", "(.|.)*!", "(\\w+\\.?)+#", "((.*)*)*y"),
    *("((a{1000}){1000}){1000}", "(", "[", "*", "(?P<n>a)(?P<n>b)", "(" * 2000 + ")" * 2000),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern[:20])
def test_a_pattern_of_an_adapter_config_ends_in_bounded_time(pattern: str) -> None:
    layout = read_model_layout(load_model("tiny")[0])
    started = time.monotonic()
    forms = [
        {"target_modules": pattern, "r": 4},
        {"target_modules": ["q_proj"], "r": 4, "rank_pattern": {pattern: 2}},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": [pattern]},
        {"rules": [{"module_path": pattern}]},
    ]
    for form in forms:
        with suppress(TextPolicyError):
            AdapterConfig.from_dict(form).selection.assign_rules(layout)
    assert time.monotonic() - started < 30
