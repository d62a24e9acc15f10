"""The commands that list and compare runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from textpolicy.cli import main
from textpolicy.config import TrainConfig, changed, to_toml
from textpolicy.config.sft import SFTConfig
from textpolicy.runs import RunDirectory

COMMAND = [sys.executable, "-c", "from textpolicy.cli import main; raise SystemExit(main())"]


@pytest.fixture
def make(tmp_path):
    """Return a function that makes a run of a config and of rows of metrics, and its path."""

    def make(name, config, rows):
        directory = RunDirectory(tmp_path / "runs" / name)
        directory.claim()
        directory.write_config(to_toml(config))
        directory.metrics.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return str(directory.path)

    return make


@pytest.fixture
def runs(tmp_path, make):
    """Make a folder with three runs: a finished run, a stopped run and a supervised run."""
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
    assert report["metrics"] == {"reward": [0.3, 0.1]}
    assert report["not_comparable"] == ""
    assert main(["runs", *paths]) == 0
    shown = capsys.readouterr().out
    assert "trainer.lr" in shown and "group_size" not in shown
    assert report["scores"]["held-out reward, last"] == [0.6, 0.2]
    assert report["scores"]["held-out reward, best"] == [0.6, 0.2]
    lines = [line.split() for line in shown.splitlines()]
    assert lines[0] == ["finished", "stopped"]
    assert lines[1] == ["held-out", "reward,", "first", "0.2", "0.2"]
    assert lines[4] == ["steps", "2/2", "1/2"]
    assert shown.index("steps") < shown.index("settings that differ:") < shown.index("trainer.lr")
    assert shown.index("trainer.lr") < shown.index("last numbers:")
    assert main(["runs", paths[0], paths[0]]) == 0
    assert "do not differ" in capsys.readouterr().out


def test_an_adapter_option_that_is_given_as_its_default_is_no_difference(make, answer):
    base = {"task.env": "add", "run.steps": 1}
    wide = {"adapter.rank": 8, "adapter.alpha": 32.0}
    started = {"adapter.start": Path("red.safetensors")}
    paths = [
        make(f"run{n}", changed(TrainConfig(), base | own), [{"step": 0, "reward": 0.1}])
        for n, own in enumerate([{}, {"adapter.rank": 16, "adapter.alpha": 32.0}, wide, started])
    ]
    assert answer("runs", *paths[:2])["config"] == {}
    # The product of scale and rank is equal.
    assert answer("runs", paths[0], paths[2])["config"] == {"adapter.rank": [16, 8]}
    halved = make("half", changed(TrainConfig(), base | {"adapter.scale": 1.0}), [])
    assert answer("runs", paths[0], halved)["config"] == {"adapter.scale": [2.0, 1.0]}
    # The adapters that a run began with have a rank of their own.
    assert "adapter.start" in answer("runs", paths[0], paths[3])["config"]


SHAPES = {"run.steps": 2, "task.data": "/no/where/rows.jsonl", "trainer.lr": 2e-3}


def test_runs_of_two_kinds_show_every_setting_that_differs_and_the_shaping_ones_first(
    make, answer, capsys
):
    shapes = {"task.reward": "close.py", "adapter.start": Path("runs/taught"), "rollout.workers": 3}
    config = changed(TrainConfig(), SHAPES | shapes)
    paid = make("paid", config, [{"step": 0, "reward": 0.5, "eval/reward": 0.2, "loss": 1e-9}])
    sft = changed(SFTConfig(), {"data.source": "texts", "trainer.iterations": 10})
    taught = make("taught", sft, [{"step": 10, "loss": 1.0, "validation/loss": 0.5}])
    report = answer("runs", taught, paid)
    assert report["scores"]["validation loss, best"] == [0.5, None]
    assert report["config"]["task.reward"] == [None, "close.py"]
    # The settings of one kind at their defaults are in the data, and are counted for a person.
    assert report["config"]["sampling.temperature"] == [None, 1.0]
    assert main(["runs", taught, paid]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("These scores cannot be compared")
    assert "the validation loss of taught and the held-out reward of paid" in first
    shown = {cells[0]: cells[1:] for line in lines if (cells := re.split(r"  +", line))}
    assert shown["data.source"] == ["texts", "—"]
    assert shown["task.data"] == ["—", "/no/where/rows.jsonl"]
    assert shown["adapter.start"] == ["not set", "runs/taught"]
    assert shown["algorithm.name"] == ["—", "grpo"]
    assert shown["rollout.workers"] == ["—", "3"]
    assert "sampling.temperature" not in shown and len(lines) < 40
    order = list(shown)
    assert order.index("data.source") < order.index("task.reward") < order.index("trainer.lr")
    assert order.index("trainer.lr") < order.index("rollout.workers")
    assert order.index("rollout.workers") < order.index("run.checkpoint_every")
    assert re.match(r"not shown: \d+ settings that only one kind of run has", lines[-1])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({}, ""),
        ({"trainer.lr": 1e-5}, ""),
        ({"task.reward": "exact.py"}, "the rewards differ (close.py, exact.py)"),
        (
            {"task.eval_data": "x.csv"},
            "held-out data differ (a part of /no/where/rows.jsonl, x.csv)",
        ),
        ({"evaluation.count": 64}, "the numbers of held-out tasks differ (512, 64)"),
    ],
)
def test_scores_of_different_things_are_shown_below_a_sentence_that_says_so(
    make, capsys, other, said
):
    base = changed(TrainConfig(), SHAPES | {"task.reward": "close.py"})
    row = {"step": 0, "reward": 0.5, "eval/reward": 0.2}
    paths = make("one", base, [row]), make("two", changed(base, other), [row | {"reward": 0.6}])
    assert main(["runs", *paths]) == 0
    shown = capsys.readouterr().out
    first = shown.splitlines()[0]
    assert said in first and first.startswith("These scores cannot be compared") == bool(said)
    assert "held-out reward, first  0.2" in shown


def test_a_standard_error_is_beside_every_score_that_has_one_and_names_are_short(make, capsys):
    scored = {"eval/rewards/close/exact": 0.25, "eval/standard_errors/close/exact": 0.125}
    rows = [
        {"step": 0, "loss": 7e-9, "reward": 0.1, "eval/reward": 0.2, "eval/standard_error": 0.01},
        {"step": 1, "loss": 2e-9, "reward": 0.3, "eval/reward": 0.6, "eval/standard_error": 0.02},
        {"step": 2, "eval/reward": 0.5, "eval/standard_error": 0.03} | scored,
    ]
    config = changed(TrainConfig(), {"task.env": "add", "run.steps": 2})
    paths = make("new", config, rows), make("old", config, rows[:1])
    assert main(["runs", *paths]) == 0
    shown = capsys.readouterr().out
    lines = [re.split(r"  +", line) for line in shown.splitlines()]
    assert lines[1:5] == [
        ["held-out reward, first", "0.200 ± 0.010", "0.200 ± 0.010"],
        ["held-out reward, last", "0.500 ± 0.030", "0.200 ± 0.010"],
        ["held-out reward, best", "0.600 ± 0.020", "0.200 ± 0.010"],
        ["held-out exact, first", "0.250 ± 0.125", "-"],
    ]
    assert "rewards/" not in shown
    # What people look at comes before the loss, which says nothing about progress.
    assert shown.index("last numbers:") < shown.index("\nreward") < shown.index("\nloss")


def test_the_list_says_of_each_best_value_what_it_measures_and_its_standard_error(
    make, runs, answer, capsys
):
    config = changed(TrainConfig(), SHAPES | {"task.reward": "close.py"})
    row = {"step": 2, "eval/reward": 0.75, "eval/standard_error": 0.02}
    make("own", config, [row])
    found = {one["name"]: one for one in answer("runs", str(runs))["runs"]}
    assert {name: one["measure"] for name, one in found.items()} == {
        "finished": "held-out reward",
        "own": "held-out reward of close.py",
        "stopped": "held-out reward",
        "taught": "validation loss",
    }
    assert (found["own"]["standard_error"], found["taught"]["standard_error"]) == (0.02, None)
    assert main(["runs", str(runs)]) == 0
    shown = capsys.readouterr().out
    assert "0.750 ± 0.020  held-out reward of close.py" in shown
    assert "0.500          validation loss" in shown


def test_a_folder_without_runs_is_an_empty_list_and_a_missing_folder_is_an_error(
    answer, failure, tmp_path
):
    assert answer("runs", str(tmp_path)) == {"runs": []}
    assert "/no/such" in failure("runs", "/no/such", code=2)
