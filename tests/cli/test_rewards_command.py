"""The command trains with a reward of the user: its file, its timeout and its failures."""

import json

import pytest

from textpolicy.cli import main

SMALL = ["--env", "add", "--steps", "1", "--group-size", "4", "--groups-per-step", "4"]
SOURCE = """
import time

def fussy(completion, example):
    if completion[-1:] in "02468":
        time.sleep(30)
    return float(completion == str(example["sum"]))
"""


@pytest.fixture
def train(tmp_path, capsys):
    """Return a function that runs a small training and returns exit code, metrics and stderr."""
    (tmp_path / "mine.py").write_text(SOURCE)

    def run(*options):
        output = tmp_path / "run"
        argv = ["train", *SMALL, "--count", "2", "--output", str(output), *options]
        code = main(argv)
        file = output / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return code, [json.loads(line) for line in lines], capsys.readouterr().err

    return run


@pytest.mark.slow
def test_the_reward_of_an_environment_runs_in_other_processes_too(train):
    code, (metrics, _), _ = train("--reward-timeout", "20")
    assert code == 0 and metrics["reward/errors"] == 0
    assert metrics["rewards/reward/mean"] == metrics["reward"]


@pytest.mark.slow
def test_a_reward_that_hangs_is_an_error_before_a_model_is_loaded(train, tmp_path):
    (tmp_path / "mine.py").write_text(SOURCE.replace("completion[-1:]", '"2"'))
    options = ["--reward", f"{tmp_path}/mine.py", "--reward-timeout", "0.3"]
    code, metrics, stderr = train(*options, "--model", "no-such-model")
    assert code == 2 and not metrics
    assert "reward fussy took longer than 0.3 s and was stopped" in stderr
    assert "no-such-model" not in stderr


@pytest.mark.slow
def test_samples_on_which_a_reward_hangs_are_skipped_and_reported(train, tmp_path):
    source = SOURCE.replace("completion[-1:]", "completion[-2:-1]")
    (tmp_path / "mine.py").write_text(source.replace('"02468"', '"01"'))
    code, (metrics, _), stderr = train(
        *("--reward", f"{tmp_path}/mine.py:fussy"),
        *("--reward-timeout", "0.2", "--on-reward-error", "skip", "--seed", "3"),
    )
    assert code == 0
    assert 0 < metrics["reward/errors"] == metrics["reward/unscored"] < 0.5
    assert "reward fussy took longer than 0.2 s and was stopped" in stderr


@pytest.mark.parametrize(
    "options",
    [["--on-reward-error", "ignore"], ["--on-reward-error", "nan"], ["--reward-timeout", "0"]],
)
def test_an_unknown_policy_for_errors_exits_with_2(train, options, capsys):
    with pytest.raises(SystemExit) as stopped:
        train(*options)
    assert stopped.value.code == 2 and "expected" in capsys.readouterr().err


def test_a_reward_that_fails_on_an_empty_answer_starts_if_the_user_has_set_its_cost(
    tmp_path, capsys
):
    rows, reward = tmp_path / "rows.jsonl", tmp_path / "mine.py"
    rows.write_text("".join(f'{{"prompt": "{n}+1="}}\n' for n in range(8)))
    reward.write_text("def last_digit(completion):\n    return int(completion[-1:])\n")
    argv = ["train", *SMALL[2:], "--data", str(rows), "--reward", str(reward), "--count", "2"]
    assert main([*argv, "--output", str(tmp_path / "refused")]) == 2
    assert "completion ''" in capsys.readouterr().err
    assert main([*argv, "--output", str(tmp_path / "run"), "--on-reward-error", "-1"]) == 0
