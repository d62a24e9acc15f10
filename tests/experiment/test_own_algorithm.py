"""`--algorithm FILE.py`: a run with an algorithm of the user, from the shell, and its resume."""

import json
import re
from pathlib import Path

import pytest

from textpolicy.cli import main
from textpolicy.config import TrainConfig, read_toml
from textpolicy.runs import RunDirectory

# A gradient of every sampled token, and a metric that tells who computed it.
MINE = """
import mlx.core as mx


def compute_advantages(rewards, *, shift=0.0):
    return mx.zeros_like(rewards) + shift


def policy_loss(logp, batch):
    loss = -mx.where(batch.mask, batch.advantages * logp, 0).sum() / batch.token_count
    mean = mx.where(batch.mask, batch.advantages, 0).sum() / batch.token_count
    return loss, {"mine/advantage": mean}
"""
RUN = [
    *("train", "--env", "add", "--group-size", "2", "--groups-per-step", "2", "--count", "4"),
    *("--algorithm-options", "{shift = 0.5}"),
]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Return the working directory, which has the file of an algorithm."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "run.toml").write_text('[algorithm]\nname = "mine.py"\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def advantages_of(directory: RunDirectory) -> list[float]:
    rows = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    return [row["mine/advantage"] for row in rows if "mine/advantage" in row]


@pytest.mark.slow
@pytest.mark.parametrize("named", [["--algorithm", "mine.py"], ["--config", "run.toml"]])
def test_a_file_trains_from_the_shell_with_its_options(folder, named):
    assert main([*RUN, *named, "--steps", "2", "--output", "run"]) == 0
    assert advantages_of(RunDirectory(folder / "run")) == [0.5, 0.5]


@pytest.mark.slow
def test_one_function_of_the_file_can_be_named(folder, capsys):
    (folder / "mine.py").write_text(MINE.replace("policy_loss", "my_loss"))
    asked = ["train", "--env", "add", "--group-size", "2", "--groups-per-step", "2"]
    asked += ["--count", "4", "--steps", "1", "--algorithm"]
    assert main([*asked, "mine.py:my_loss", "--output", "run"]) == 0
    assert advantages_of(RunDirectory(folder / "run")) == [0.0]
    assert main([*asked, "mine.py:my_los"]) == 2
    assert "did you mean 'my_loss'" in capsys.readouterr().err.lower()


@pytest.mark.slow
def test_a_run_with_a_file_is_resumed_to_the_same_numbers(folder, capsys):
    asked = [*RUN, "--algorithm", "mine.py"]
    assert main([*asked, "--steps", "3", "--output", "whole"]) == 0
    assert main([*asked, "--steps", "1", "--output", "parts"]) == 0
    assert main(["train", "--resume", "parts", "--steps", "3"]) == 0
    whole, parts = RunDirectory(folder / "whole"), RunDirectory(folder / "parts")
    assert read_toml(parts.config, TrainConfig()).algorithm.name == str(folder / "mine.py")
    assert advantages_of(parts) == advantages_of(whole)
    assert parts.latest.read_bytes() == whole.latest.read_bytes()
    (folder / "mine.py").write_text(MINE + "# edited\n")
    assert main(["train", "--resume", "parts", "--steps", "4"]) == 2
    assert "algorithm: mine.py has changed" in capsys.readouterr().err


def test_the_error_about_a_missing_file_names_it_before_a_model_is_loaded(folder, capsys):
    (folder / "mine.py").unlink()
    assert main([*RUN, "--algorithm", "mine.py", "--model", "no-such-model"]) == 2
    assert "algorithm file 'mine.py' does not exist" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "old", "new"),
    [
        ("compute_advantages", "return mx.zeros_like(rewards)", "return undefined_name"),
        ("policy_loss", "batch.token_count", "batch.tokens_count"),
    ],
)
def test_an_exception_in_the_file_names_the_function_and_the_line(
    folder, capsys, function, old, new
):
    (folder / "mine.py").write_text(MINE.replace(old, new))
    line = next(n for n, text in enumerate(MINE.splitlines(), start=1) if old in text)
    assert main([*RUN, "--algorithm", "mine.py", "--steps", "1", "--output", "run"]) == 1
    error = capsys.readouterr().err
    assert f"{function} of {folder / 'mine.py'} raised" in error
    assert f"line {line}" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        ('Declaration(trainer={"epoch": 2})', "gives the trainer 'epoch', which.*it can set: "),
        ('Declaration(trainer={"seed": 2})', "gives the trainer 'seed', which"),
        ('{"epochs": 2}', r"DECLARATION of \S*mine.py is a dict; expected"),
    ],
)
def test_a_wrong_declaration_is_refused(folder, capsys, declaration, message):
    imported = "from textpolicy.algorithms import Declaration\n"
    (folder / "mine.py").write_text(f"{imported}{MINE}\nDECLARATION = {declaration}\n")
    assert main([*RUN, "--algorithm", "mine.py", "--steps", "1", "--output", "run"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert "Traceback" not in error
