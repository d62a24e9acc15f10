"""Runs that need far more than the machine has are refused, with numbers and what would fit."""

import json
import re
import shutil
import time
from dataclasses import replace

import pytest

from textpolicy.cli import main
from textpolicy.config import TrainConfig
from textpolicy.experiment.preflight import disk_problems
from textpolicy.experiment.run_size import Lengths, RunSize
from textpolicy.machine import free_disk_bytes, memory_bytes, size_text


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Return a function that runs a command that must be refused at once and leave nothing."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*argv: str) -> str:
        started = time.monotonic()
        capsys.readouterr()
        assert main(argv) == 2
        assert time.monotonic() - started < 10
        assert list(folder.iterdir()) == []
        return capsys.readouterr().err

    return run


BEYOND = {
    "groups": (["--groups-per-step", "125000000"], "1,000,000,000 completions"),
    "group": (["--group-size", "1000000000"], "16,000,000,000 completions"),
    "generation": (["--steps-per-generation", "100000000"], "12,800,000,000 completions"),
    "held out": (["--count", "1000000000"], "1,000,000,000 completions"),
    "held-out samples": (["--eval-samples", "1000000"], "512,000,000 completions"),
}


@pytest.mark.proves("F13")
@pytest.mark.parametrize("name", BEYOND)
def test_more_completions_than_memory_holds_are_refused_and_the_advice_fits(
    name, refused, attempts, capsys
):
    beyond, number = BEYOND[name]
    message = refused("train", "--env", "add", *beyond)
    assert number in message and f"this machine has {size_text(memory_bytes())}" in message
    # The advice is true: the same command with it is not refused.
    advice = re.search(r"This would fit: (.*?)\. To start", message)
    assert advice and main(["train", "--env", "add", *beyond, *advice[1].split(), "--dry-run"]) == 0
    assert "no run was started" in capsys.readouterr().out
    attempts.add()


@pytest.mark.proves("F13")
def test_a_model_that_the_machine_cannot_hold_is_refused_before_its_weights_are_read(
    refused, attempts, tiny, tmp_path
):
    folder = tmp_path / "large"
    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    sizes = {"hidden_size": 65536, "intermediate_size": 262144, "num_hidden_layers": 16}
    (folder / "config.json").write_text(json.dumps(config | sizes))
    message = refused("train", "--env", "add", "--model", str(folder))
    assert "TB of memory" in message and "Choose a smaller model" in message
    attempts.add()


@pytest.mark.proves("F13")
def test_a_batch_of_demonstrations_that_does_not_fit_is_refused(refused, attempts, tmp_path):
    rows = tmp_path / "rows.jsonl"
    pairs = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(10, 30)]
    rows.write_text("\n".join(map(json.dumps, pairs)))
    message = refused("sft", "--data", str(rows), "--batch-size", "1000000000")
    assert "TB at the peak of training" in message
    assert re.search(r"This would fit: (--checkpoint-gradients )?--batch-size \d", message)
    attempts.add()


@pytest.mark.proves("F13")
def test_more_checkpoints_than_the_disk_holds_are_refused(refused, attempts):
    message = refused("train", "--env", "add", "--keep-checkpoints", "1000000000")
    assert "1,000,000,001 checkpoints" in message and "free" in message
    attempts.add()


@pytest.mark.proves("F13")
def test_more_samples_than_the_disk_holds_are_refused_and_the_advice_fits(
    refused, attempts, capsys
):
    many = ["train", "--env", "add", "--steps", "1000000000"]
    message = refused(*many)
    assert re.search(r"would write about [\d,.]+ TB", message) and " GB free" in message
    assert "samples.jsonl" in message and "--limits warn" in message
    # The advice leaves the metrics, which are too many too.
    assert "metrics.jsonl" in refused(*many, "--sample-groups", "0")
    assert main([*many[:-1], "100000", "--sample-groups", "0", "--dry-run"]) == 0
    attempts.add()


def test_what_a_run_has_written_is_not_asked_for_again(tmp_path):
    config = TrainConfig()
    size = RunSize(
        lengths=Lengths(prompt=1, completion=1),
        memory=None,
        samples_bytes=free_disk_bytes(tmp_path),
    )
    size = replace(size, steps_bytes=10**9)
    (problem,) = disk_problems(config, size, tmp_path, written=0)
    assert "would write about" in problem
    assert not list(disk_problems(config, size, tmp_path, written=2 * 10**9))
