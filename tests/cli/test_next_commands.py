"""The commands that a run prints at its end are commands that work."""

import io
import json
import re
import shlex
import sys
from dataclasses import replace
from typing import Any

import pytest
from openai import OpenAI

from tests.serving.command import serve_while
from textpolicy.cli import main
from textpolicy.cli.commands.train import describe_adapter
from textpolicy.cli.flags import configured
from textpolicy.cli.next_commands import next_commands
from textpolicy.cli.parser import build_parser
from textpolicy.config import TrainConfig, changed, to_toml
from textpolicy.experiment import Measurement, RunResult
from textpolicy.experiment.tasks import find_task
from textpolicy.rewards import score
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
        out = capsys.readouterr().out
        lines = [line for line in out.partition("\nnext:\n")[2].splitlines() if line[:1] == " "]
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
    assert "my runs/a b/adapters/latest.safetensors" in following["try it"]
    for argv in following.values():
        assert_works(argv, monkeypatch, capsys)


@pytest.fixture
def questions(tmp_path):
    """Write rows without the columns that supervised training reads."""
    rows = [{"question": f"{n}+{n}", "sum": str(2 * n)} for n in range(20)]
    (tmp_path / "my rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ("--data", "my rows.jsonl", "--prompt", "{question}=", "--gold-column", "sum")


@pytest.mark.slow
def test_every_line_that_supervised_training_prints_as_next_works(
    printed, questions, monkeypatch, capsys
):
    following = printed(
        *("sft", *questions, "--iterations", "1", "--batch-size", "2"),
        *("--dtype", "bfloat16", "--allow-special-tokens", "--system", "Don't stop."),
        *("--quantize", "4", "--rank", "2"),
    )
    assert [line[1] for line in following.values()] == [
        *("chat", "eval", "train", "serve", "report", "export")
    ]
    assert following["serve it"][-3:] == ["--dtype", "bfloat16", "--allow-special-tokens"]
    assert following["try it"][-2:] == ["--system", "Don't stop."]
    few = ["--steps", "1", "--groups-per-step", "2", "--group-size", "2", "--max-tokens", "4"]
    for argv in following.values():
        assert_works(argv + (few if argv[1] == "train" else []), monkeypatch, capsys)


def test_the_lines_after_supervised_training_read_the_same_rows_and_measure_unlearned_ones(
    printed, questions, tmp_path
):
    following = printed("sft", *questions, "--iterations", "1", "--batch-size", "2", "--rank", "2")
    options = {
        name: configured(TrainConfig(), build_parser().parse_args(following[name][1:])).task
        for name in ("compare it", "train it on")
    }
    train = options["train it on"]
    assert options["compare it"] == replace(train, data=None)
    environment, rewards = find_task(train, 0)
    learned = {task.prompt for task in environment.tasks.train}
    measured = environment.heldout(20)
    assert len(learned) == 18 and len(measured) == 2
    assert not learned & {task.prompt for task in measured}
    right = [environment.tasks.train[0].example["sum"], measured[0].example["sum"]]
    first = environment.tasks.train[0]
    assert first.prompt == f"{int(right[0]) // 2}+{int(right[0]) // 2}="
    assert score(rewards, first.prompt, f" {right[0]}", first.example) == 1


def test_rows_that_have_no_prompt_get_no_line_that_would_not_work(printed, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("one\ntwo\nthree\n")
    following = printed("sft", "--data", "texts.txt", "--iterations", "1", "--batch-size", "2")
    assert [line[1] for line in following.values()] == ["chat", "serve", "report", "export"]


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
    result.directory.adapters.mkdir(parents=True)
    result.directory.latest.touch()
    start = tmp_path / "shown.safetensors"
    begun = changed(TrainConfig(), {"adapter.start": start})
    line = shlex.split(next_commands(result, begun)["compare it"])
    assert line[-2:] == ["--before", str(start)]
    assert "--before" not in next_commands(result, TrainConfig())["compare it"]


def test_a_run_outside_the_working_directory_is_named_by_its_whole_path(printed, tmp_path):
    outside = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    following = printed("train", *SMALL, "--output", str(outside))
    assert following["look at it"] == ["textpolicy", "report", str(outside)]


@pytest.mark.slow
@pytest.mark.parametrize(("every", "named"), [("none", "latest"), ("1", "best")])
def test_the_adapter_that_is_named_next_has_the_score_that_the_run_printed(
    every, named, answer, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    more = ["--steps", "3", "--lr", "0.02", "--output", "run", "--eval-every", every]
    found = answer("train", *SMALL, *more)
    argv = shlex.split(next(line for line in found["next"] if " eval " in line))[1:]
    assert argv[-1] == found["next"][0].split()[-1] == f"run/adapters/{named}.safetensors"
    printed = found["best"] if every == "1" else found["after"]
    assert answer(*argv)["adapter"]["reward"] == printed["reward"]
    assert found["adapter"] == str(tmp_path / argv[-1])


@pytest.mark.parametrize(
    ("every", "best", "words"),
    [
        (None, 2, "latest.safetensors (the last one, measured after the run)"),
        (2, 4, "best.safetensors (the last one, which has the best measurement)"),
        (2, 2, "best.safetensors (the best one, 0.700 ± 0.100 after step 2)\nlast adapter: "),
        (2, 0, "best.safetensors (from before training: no later measurement is better than 0.7"),
    ],
)
def test_a_run_says_which_adapter_its_next_lines_name_and_why(every, best, words, tmp_path):
    directory = RunDirectory(tmp_path)
    directory.adapters.mkdir()
    for path in (directory.latest, directory.best):
        path.touch()
    directory.write_config(to_toml(changed(TrainConfig(), {"evaluation.every": every})))
    measured = Measurement(name="greedy reward", value=0.7, standard_error=0.1, count=9, step=best)
    result = RunResult(
        directory=directory,
        ended="finished",
        steps=4,
        updates=4,
        seconds=1.0,
        before=replace(measured, step=0),
        after=replace(measured, value=0.5, step=4),
        best=measured,
    )
    assert words in describe_adapter(result)
