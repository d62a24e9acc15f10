"""The commands that a run prints at its end are commands that work."""

import io
import json
import re
import shlex
import sys
from typing import Any

import pytest
from openai import OpenAI

from tests.serving.command import serve_while
from textpolicy.cli import main
from textpolicy.cli.next_commands import next_commands
from textpolicy.config import TrainConfig, changed
from textpolicy.experiment import RunResult
from textpolicy.runs import RunDirectory

SMALL = [
    *("--env", "add", "--steps", "1", "--group-size", "2", "--groups-per-step", "2"),
    *("--count", "4", "--max-tokens", "4", "--rank", "2", "--alpha", "4"),
]


@pytest.fixture
def printed(capsys, monkeypatch, tmp_path):
    """Return a function that runs a command in a folder and returns the lines it says are next."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> dict[str, list[str]]:
        capsys.readouterr()
        assert main(argv) == 0
        lines = capsys.readouterr().out.partition("\nnext:\n")[2].splitlines()
        found = [re.fullmatch(r"  (\w+ \w+(?: \w+)?)  +(.+)", line) for line in lines]
        assert found and all(found)
        return {match[1]: shlex.split(match[2]) for match in found if match}

    return run


def assert_works(argv: list[str], monkeypatch, capsys) -> None:
    program, *rest = argv
    assert program == "textpolicy"
    if rest[0] == "serve":
        code, answer = serve_while([*rest, "--no-token"], ask_the_last_model)
        assert code == 130 and answer.usage.completion_tokens > 0
        return
    monkeypatch.setattr(sys, "stdin", io.StringIO("1+2=\n"))
    assert main(rest) == 0, capsys.readouterr().err


def ask_the_last_model(client: OpenAI) -> Any:
    *_, model = client.models.list()
    asked = [{"role": "user", "content": "1+2="}]
    return client.chat.completions.create(model=model.id, messages=asked, max_tokens=2)


@pytest.mark.slow
def test_every_line_that_a_run_prints_as_next_works(printed, monkeypatch, capsys):
    following = printed("train", *SMALL, "--output", "my runs/a b")
    assert [line[1] for line in following.values()] == ["chat", "eval", "serve", "report", "export"]
    assert "my runs/a b/adapters/best.safetensors" in following["try it"]
    for argv in following.values():
        assert_works(argv, monkeypatch, capsys)


@pytest.mark.slow
def test_every_line_that_supervised_training_prints_as_next_works(
    printed, monkeypatch, capsys, tmp_path
):
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    following = printed(
        *("sft", "--data", "rows.jsonl", "--iterations", "1", "--batch-size", "2"),
        *("--dtype", "bfloat16", "--allow-special-tokens"),
    )
    assert [line[1] for line in following.values()] == ["chat", "serve", "report", "export"]
    assert following["try it"][-3:] == ["--dtype", "bfloat16", "--allow-special-tokens"]
    for argv in following.values():
        assert_works(argv, monkeypatch, capsys)


@pytest.mark.slow
def test_the_lines_work_for_a_quantized_base_and_again_after_a_resume(printed, monkeypatch, capsys):
    quantized = ("--quantize", "4", "--quantize-mode", "nf4", "--output", "run")
    for argv in (("train", *SMALL, *quantized), ("train", "--resume", "run", "--steps", "2")):
        following = printed(*argv)
        assert "--dequantize" in following["export it"]
        for argv in following.values():
            assert_works(argv, monkeypatch, capsys)


@pytest.mark.slow
def test_the_line_that_the_demo_prints_keeps_a_run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--steps", "1"]) == 0
    line = capsys.readouterr().out.rpartition("type: textpolicy ")[2]
    assert_works(["textpolicy", *shlex.split(line)], monkeypatch, capsys)
    assert (tmp_path / "runs" / "add" / "adapters" / "latest.safetensors").is_file()


def test_a_run_that_began_with_adapters_is_compared_with_them(tmp_path):
    result = RunResult(
        directory=RunDirectory(tmp_path / "paid"),
        ended="finished",
        steps=1,
        updates=1,
        seconds=0.1,
        before=None,
        after=None,
        best=None,
    )
    start = tmp_path / "shown.safetensors"
    begun = changed(TrainConfig(), {"adapter.start": start})
    line = shlex.split(next_commands(result, begun)["compare it"])
    assert line[-2:] == ["--before", str(start)]
    assert "--before" not in next_commands(result, TrainConfig())["compare it"]


def test_a_run_outside_the_working_directory_is_named_by_its_whole_path(printed, tmp_path):
    outside = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    following = printed("train", *SMALL, "--output", str(outside))
    assert following["look at it"] == ["textpolicy", "report", str(outside)]
