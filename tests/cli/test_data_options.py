"""Addresses, columns, rows to measure on and streams, as options of the commands."""

import json

import pytest

from tests.environments.layouts import sums, write_jsonl, write_sums
from textpolicy.cli import main
from textpolicy.runs import RunDirectory

SMALL = ("--groups-per-step", "2", "--group-size", "2", "--max-tokens", "4", "--count", "4")
REWARD = """
def right(completion, gold):
    return float(completion.strip() == gold)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return the working directory, with a copy of a data set and a reward."""
    monkeypatch.chdir(tmp_path)
    write_sums(tmp_path / "copy")
    (tmp_path / "reward.py").write_text(REWARD)
    return tmp_path


ASKED = ("--prompt", "{question}", "--columns", "gold=answer")


def train(answer, output, *more, steps=3):
    flags = ("--reward", "reward.py", *ASKED, *SMALL, "--steps", str(steps), "--output", output)
    return answer("train", *flags, *more)


def trained_prompts(folder, run):
    lines = RunDirectory(folder / run).samples.read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines]


@pytest.mark.slow
def test_a_run_on_a_stream_that_is_resumed_continues_at_the_same_row(answer, folder):
    rows = ("--data", "copy:main", "--eval-data", "copy:main:test", "--data-stream")
    train(answer, "whole", *rows)
    train(answer, "parts", *rows, steps=1)
    answer("train", "--resume", "parts", "--steps", "3")
    assert trained_prompts(folder, "parts") == trained_prompts(folder, "whole")
    assert {row["question"] for row in sums(0, 40)} >= set(trained_prompts(folder, "whole"))
    config = RunDirectory(folder / "whole").config.read_text()
    assert f'data = "{folder}/copy:main"' in config
    assert 'columns = {gold = "answer"}' in config


@pytest.mark.slow
def test_held_out_rows_of_their_own_belong_to_a_resumed_run(answer, failure, folder):
    write_jsonl(folder / "test.jsonl", sums(90, 4))
    rows = ("--data", "copy:main:train", "--eval-data", "test.jsonl")
    train(answer, "run", *rows, steps=1)
    write_jsonl(folder / "test.jsonl", sums(80, 4))
    message = failure("train", "--resume", "run", "--steps", "2")
    assert "held-out rows: test.jsonl has changed" in message


def test_a_table_of_columns_is_a_section_of_the_config(answer, folder):
    (folder / "run.toml").write_text(
        '[task]\ndata = "copy:main:train"\nreward = "reward.py"\nprompt = "{question}"\n'
        '[task.columns]\ngold = "answer"\n'
    )
    found = answer("eval", "--config", "run.toml", *SMALL[4:])
    assert found["base"]["count"] == 4


def test_eval_measures_all_rows_to_measure_on_and_a_tenth_of_others(answer, folder):
    asked = ("--reward", "reward.py", *ASKED, "--max-tokens", "2")
    tenth = answer("eval", "--data", "copy:main:test", *asked)
    whole = answer("eval", "--eval-data", "copy:main:test", *asked)
    streamed = answer("eval", "--data", "copy:long:train", "--data-stream", *asked)
    assert (tenth["base"]["count"], whole["base"]["count"]) == (1, 10)
    assert 1 <= streamed["base"]["count"] <= 12


def test_eval_says_that_a_part_of_the_rows_is_measured(folder, capsys):
    asked = ("--reward", "reward.py", *ASKED, "--max-tokens", "2")
    assert main(["eval", "--data", "copy:main:test", *asked]) == 0
    assert "--eval-data copy:main:test measures every row" in capsys.readouterr().out
    assert main(["eval", "--eval-data", "copy:main:test", *asked]) == 0
    assert "measures every row" not in capsys.readouterr().out


def test_check_tries_a_reward_on_columns_of_a_stream(answer, folder):
    rows = ("--data", "copy:main:train", "--data-stream", *ASKED, "--rows", "8")
    found = answer("check", "reward.py", *rows)
    assert found["ok"] and found["title"].endswith("on 8 rows")
    assert "0+0=" in found["asked"]


@pytest.mark.slow
def test_bench_takes_steps_on_streamed_rows(answer, folder):
    rows = ("--data", "copy:main:train", "--data-stream", "--reward", "reward.py", *ASKED)
    small = ("--groups-per-step", "1", "--group-size", "2", "--seconds", "0.001")
    assert answer("bench", *rows, *small)["steps"] == 1


@pytest.mark.slow
def test_sft_learns_from_columns_and_validates_on_rows_of_their_own(folder, capsys):
    shown = ("--columns", "prompt=question", "completion=answer", "--iterations", "1")
    own = ("--data", "copy:main:train", "--eval-data", "copy:main:test")
    for data, parts in {own: "10 to validate", ("--data", "copy:main"): "10 to test"}.items():
        assert main(["sft", *shown, *data, "--output", parts]) == 0
        assert parts in capsys.readouterr().err.partition("the first prompt")[0]


def test_wrong_names_are_errors_with_the_names_that_exist(failure, folder):
    asked = ("--reward", "reward.py", *ASKED)
    message = failure("train", "--data", "copy", *asked, code=2)
    assert "its configurations are ['main', 'long']" in message
    message = failure("train", "--data", "copy:main", "--eval-data", "copy:main:dev", *asked)
    assert "its splits are ['train', 'test']" in message
    message = failure("check", "reward.py", "--data", "copy:main", "--columns", "gold=anwser")
    assert "Did you mean 'answer'?" in message
    message = failure("sft", "--data", "copy:main", "--columns", "prompt=3", code=2)
    assert "columns has prompt=3; expected NAME=COLUMN" in message
    message = failure("train", "--data", "hf:a b", *asked, code=2)
    assert "is not the address of a data set on the hub" in message
