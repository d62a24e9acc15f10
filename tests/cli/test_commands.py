"""The commands that list and compare runs."""

import json
import os
import subprocess
import sys

import pytest

from textpolicy.cli import main
from textpolicy.config import TrainConfig, changed, to_toml
from textpolicy.config.sft import SFTConfig
from textpolicy.runs import RunDirectory

COMMAND = [sys.executable, "-c", "from textpolicy.cli import main; raise SystemExit(main())"]


@pytest.fixture
def runs(tmp_path):
    """Make a folder with three runs: a finished run, a stopped run and a supervised run."""

    def make(name, config, rows):
        directory = RunDirectory(tmp_path / "runs" / name)
        directory.claim()
        directory.write_config(to_toml(config))
        directory.metrics.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    base = changed(TrainConfig(), {"task.env": "add", "run.steps": 2})
    steps = [
        {"step": 0, "reward": 0.1, "eval/reward": 0.2},
        {"step": 1, "reward": 0.3},
        {"step": 2, "eval/reward": 0.6},
    ]
    make("finished", base, steps)
    make("stopped", changed(base, {"trainer.lr": 1e-5, "algorithm.name": "dapo"}), steps[:1])
    sft = changed(SFTConfig(), {"data.source": "rows", "trainer.iterations": 10})
    make("taught", sft, [{"step": 10, "loss": 1.0, "validation/loss": 0.5}])
    return tmp_path / "runs"


def test_runs_are_listed_with_their_state_and_their_steps(runs, answer, capsys):
    found = {one["name"]: one for one in answer("runs", str(runs))["runs"]}
    assert {name: one["state"] for name, one in found.items()} == {
        "finished": "finished",
        "stopped": "stopped",
        "taught": "finished",
    }
    assert (found["finished"]["best"], found["taught"]["best"]) == (0.6, 0.5)
    assert (found["stopped"]["steps"], found["stopped"]["planned"]) == (1, 2)
    assert (found["stopped"]["algorithm"], found["taught"]["algorithm"]) == ("dapo", "sft")
    assert main(["runs", str(runs)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_a_damaged_run_hides_no_other_run_and_is_an_error_if_it_is_named(runs, answer, failure):
    (runs / "stopped" / "config.toml").write_text("[run\n")
    states = {one["name"]: one["state"] for one in answer("runs", str(runs))["runs"]}
    assert states == {"finished": "finished", "stopped": "unreadable", "taught": "finished"}
    assert "is not TOML" in failure("runs", str(runs / "stopped"), code=2)


def test_a_reader_that_closes_the_pipe_early_causes_no_error(runs):
    command = [*COMMAND, "runs", str(runs)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(60) == 0


@pytest.mark.slow
def test_a_run_continues_after_the_reader_of_its_output_has_closed_the_pipe(tmp_path):
    small = ["--steps", "3", "--count", "4", "--groups-per-step", "2", "--group-size", "2"]
    argv = ["train", "--env", "add", *small, "--output", str(tmp_path / "run")]
    process = subprocess.Popen(
        [*COMMAND, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # Python keeps what it could not write, and writes it again at exit.
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 0
    assert RunDirectory(tmp_path / "run").report.is_file()


def test_a_run_whose_lock_is_held_is_running(runs, answer):
    with RunDirectory(runs / "stopped").lock():
        (one,) = answer("runs", str(runs / "stopped"))["runs"]
    assert one["state"] == "running"


def test_comparing_two_runs_shows_only_what_differs(runs, answer, capsys):
    paths = [str(runs / "finished"), str(runs / "stopped")]
    report = answer("runs", *paths)
    assert report["config"] == {"algorithm.name": ["grpo", "dapo"], "trainer.lr": [5e-4, 1e-5]}
    assert report["metrics"]["eval/reward"] == [0.6, 0.2]
    assert report["metrics"]["best eval/reward"] == [0.6, 0.2]
    assert main(["runs", *paths]) == 0
    shown = capsys.readouterr().out
    assert "trainer.lr" in shown and "group_size" not in shown
    assert report["scores"]["held-out reward, last"] == [0.6, 0.2]
    lines = [line.split() for line in shown.splitlines()]
    assert lines[0] == ["finished", "stopped"]
    assert lines[1] == ["held-out", "reward,", "first", "0.2", "0.2"]
    assert lines[4] == ["steps", "2/2", "1/2"]
    assert shown.index("steps") < shown.index("settings that differ:") < shown.index("trainer.lr")
    assert shown.index("trainer.lr") < shown.index("last numbers:")
    assert main(["runs", paths[0], paths[0]]) == 0
    assert "do not differ" in capsys.readouterr().out


def test_runs_of_two_kinds_are_compared_by_the_settings_that_both_have(runs, answer, capsys):
    paths = [str(runs / "finished"), str(runs / "taught")]
    report = answer("runs", *paths)
    assert report["scores"]["validation loss, best"] == [None, 0.5]
    assert None not in [value for values in report["config"].values() for value in values]
    assert main(["runs", *paths]) == 0
    assert len(capsys.readouterr().out.splitlines()) < 25


def test_a_folder_without_runs_is_an_empty_list_and_a_missing_folder_is_an_error(
    answer, failure, tmp_path
):
    assert answer("runs", str(tmp_path)) == {"runs": []}
    assert "/no/such" in failure("runs", "/no/such", code=2)
