"""`textpolicy eval` says what is measured and what is compared, and shows gains and losses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.served_adapters import write_adapters
from textpolicy.cli import main
from textpolicy.cli.shown_tasks import data_of_tasks, lines_of_answers, lines_of_differences
from textpolicy.config import TrainConfig, changed
from textpolicy.config.toml import to_toml
from textpolicy.errors import TaskError
from textpolicy.evaluation import Evaluation
from textpolicy.runs import RunDirectory
from textpolicy.types import Rollout, Sampling, StopReason, Task

REWARD = "def mixed(completion): return float(sum(map(ord, completion)) % 2)\n"
ENV = """
PROMPT = "What is {prompt}"

def reward(completion):
    return float(len(completion) % 2)
"""
ROWS = [{"prompt": f"{n}+{n + 3}="} for n in range(8)]


@pytest.fixture(scope="module")
def adapters(load_tiny, tmp_path_factory):
    """Write two adapters, whose answers differ from the model's and from each other's."""
    return write_adapters(tmp_path_factory.mktemp("adapters"), load_tiny)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Work in a folder with a reward, rows to train on and rows to measure on."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mixed.py").write_text(REWARD)
    for name, rows in (("train", ROWS), ("heldout", ROWS[:5])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


ASKED = ("--reward", "mixed.py", "--max-tokens", "4")
HELD_OUT = ("--eval-data", "heldout.jsonl", *ASKED)


def run_with(folder: Path, adapter: Path, start: Path | None) -> RunDirectory:
    """Return a run that has this adapter as its latest one, and began with `start`."""
    run = RunDirectory(folder / "run")
    run.claim()
    run.write_config(to_toml(changed(TrainConfig(), {"adapter.start": start})))
    run.adapters.mkdir()
    run.latest.write_bytes(adapter.read_bytes())
    return run


def test_two_adapters_compared_score_as_each_does_beside_the_base(answer, folder, adapters):
    red, blue = (str(adapters[name]) for name in ("red", "blue"))
    alone = {name: answer("eval", *HELD_OUT, "--adapter", name) for name in (red, blue)}
    both = answer("eval", *HELD_OUT, "--adapter", blue, "--before", red)
    assert both["before"] == alone[red]["adapter"] and both["adapter"] == alone[blue]["adapter"]
    assert "base" not in both
    assert both["compared"] == {"before": red, "adapter": blue}
    assert alone[red]["base"] == alone[blue]["base"]
    assert alone[red]["compared"] == {"base": "the base model", "adapter": red}


def test_a_run_that_began_with_adapters_is_compared_with_them_if_asked(folder, adapters, capsys):
    run_with(folder, adapters["red"], adapters["red"])
    assert main(["eval", *HELD_OUT, "--adapter", "run"]) == 0
    shown = capsys.readouterr().out
    line = f"The run run began with {adapters['red']}, and is compared with the base model."
    assert line in shown and f"add --before {adapters['red']}" in shown
    assert main(["eval", *HELD_OUT, "--adapter", "run", "--before", str(adapters["red"])]) == 0
    shown = capsys.readouterr().out
    assert "began with" not in shown
    assert f"run/adapters/latest.safetensors is compared with {adapters['red']}" in shown
    # It is the same adapter.
    assert "gain  +0.000, 95 % interval +0.000 to +0.000" in shown
    assert "\nbefore   greedy" in shown and "\nadapter  greedy" in shown


@pytest.mark.parametrize("env", [None, "own.py"])
def test_tasks_that_an_adapter_was_trained_on_are_counted(answer, folder, adapters, env):
    (folder / "own.py").write_text(ENV)
    run = run_with(folder, adapters["red"], None)
    given = {"task.data": str(folder / "train.jsonl"), "task.env": env}
    run.write_config(to_toml(changed(TrainConfig(), given)))
    asked = ("eval", *HELD_OUT, *(["--env", env] if env else []))
    (note,) = answer(*asked, "--adapter", str(adapters["blue"]), "--before", "run")["notes"]
    # One of the 5 is the tenth of the rows that the run has held out.
    assert note.startswith("4 of these 5 tasks are among the rows that run trains on, so its score")
    alone = answer(*asked, "--adapter", "run")
    assert alone["notes"] == [note] and alone["env"] == ("own" if env else "heldout")
    # The run has left out the tasks that it measures on.
    given["task.eval_data"] = str(folder / "heldout.jsonl")
    run.write_config(to_toml(changed(TrainConfig(), given)))
    assert answer(*asked, "--adapter", "run")["notes"] == []
    (folder / "train.jsonl").unlink()
    assert answer(*asked, "--adapter", "run")["notes"] == []


def test_something_to_compare_with_needs_something_to_compare(failure, folder, adapters):
    message = failure("eval", *HELD_OUT, "--before", str(adapters["red"]), code=2)
    assert "no adapters are named to compare. Name them too: --adapter ADAPTER" in message


def test_eval_names_the_file_whose_rows_it_measures(answer, folder, capsys):
    assert main(["eval", "--data", "train.jsonl", *HELD_OUT, "--max-tokens", "1"]) == 0
    shown = capsys.readouterr().out
    assert "tiny on 5 tasks of heldout.jsonl\n" in shown
    assert (
        "100% of the greedy answers of base are cut off at 1 tokens; --max-tokens allows" in shown
    )
    whole_path = ("--eval-data", str(folder / "heldout.jsonl"))
    first = answer("eval", "--data", "train.jsonl", *whole_path, *ASKED, "--count", "3")
    assert first["measured"] == "the first 3 tasks of heldout.jsonl"
    tenth = answer("eval", "--data", "train.jsonl", *ASKED)
    assert tenth["measured"] == "1 held-out tasks of train.jsonl"


def test_eval_of_a_run_with_a_quantized_base_measures_the_quantized_base(answer, folder):
    asked = ("eval", *HELD_OUT, "--max-tokens", "8")
    coarse = answer(*asked, "--set", "model.quantize=2")
    assert coarse["metrics"] != answer(*asked)["metrics"]


# What is shown


def evaluation(*rewards: float | None) -> Evaluation:
    return Evaluation(greedy=[rollout(reward) for reward in rewards], sampled=[], good=0.5)


def rollout(reward: float | None) -> Rollout:
    return Rollout(
        tokens=[1, 2],
        mask=[False, True],
        logprobs=[0.0, 0.0],
        completion=f"said\n{reward}",
        reward=reward,
        stop_reason=StopReason.STOP_TOKEN,
        sampling=Sampling(),
        version=0,
    )


TASKS = [Task(id=str(n), prompt=f"p{n}") for n in range(6)]


def prompts(lines: list[str]) -> list[str]:
    words = [line.split() for line in "\n".join(lines).splitlines()]
    return [word[1] for word in words if word[:1] == ["prompt"]]


def titles(lines: list[str]) -> list[str]:
    return [line for line in lines if line.endswith(":")]


def test_gains_and_losses_are_shown_in_equal_numbers_the_largest_first():
    before, after = evaluation(0, 0, 0, 0.9, 1, 1), evaluation(1, 0.5, 0.8, 0.3, 0, 1)
    both = {"base": before, "adapter": after}
    lines = lines_of_differences(TASKS, both, 4)
    assert titles(lines) == ["largest gains (2 of 3 tasks):", "largest losses (2 of 2 tasks):"]
    assert prompts(lines) == ["p0", "p2", "p4", "p3"]
    assert "  base 0     said⏎0\n  adapter 1  said⏎1" in "\n".join(lines)
    assert prompts(lines_of_differences(TASKS, both, 1)) == ["p0"]
    assert prompts(lines_of_differences(TASKS, both, 3)) == ["p0", "p2", "p4"]
    assert lines_of_differences(TASKS, both, 0) == []


def test_an_answer_is_shown_with_its_numbers_and_the_right_answer():
    tasks = [replace(task, example={"answer": f"right\n{task.id}"}) for task in TASKS]
    numbers = {"rewards/reward/exact": 0.0, "rewards/reward/len ok": 1.0}
    rollouts = [replace(rollout(0.5), metrics=numbers) for _ in TASKS]
    one = Evaluation(greedy=rollouts, sampled=[], good=0.5)

    def read(example):
        return example["answer"]

    shown = (
        "  prompt        p0\n  reward 0.5    said⏎0.5\n    numbers     exact 0, len ok 1\n"
        "  right answer  right⏎0"
    )
    assert shown in "\n".join(lines_of_answers(tasks, one, 1, read))
    assert lines_of_answers(tasks, one, 1, lambda example: None)[-1].startswith("  prompt")
    both = lines_of_differences(tasks, {"base": one, "adapter": one}, 1, read)
    assert both[-1].endswith("  right answer  right⏎0")
    first = data_of_tasks(tasks, {"adapter": one}, read)[0]
    assert first["prompt"] == "p0" and first["right_answer"] == "right\n0"
    assert first["adapter"]["numbers"] == {"exact": 0.0, "len ok": 1.0}


def test_a_fault_of_gold_loses_no_scores():
    def read(example):
        raise TaskError("gold raised KeyError")

    one = Evaluation(greedy=[rollout(0.5) for _ in TASKS], sampled=[], good=0.5)
    first, *_ = data_of_tasks(TASKS, {"adapter": one}, read)
    assert first["right_answer"] is None and first["adapter"]["reward"] == 0.5


def test_an_answer_is_shown_with_the_value_of_each_of_several_rewards():
    parts = [replace(rollout(0.5), rewards={"form": 1.0, "right": 0.0}) for _ in TASKS]
    one = Evaluation(greedy=parts, sampled=[], good=0.5)
    first = data_of_tasks(TASKS, {"adapter": one}, None)[0]
    assert first["adapter"]["numbers"] == {"form": 1.0, "right": 0.0}


def test_the_help_of_adapters_says_what_the_command_does_with_them(capsys):
    for command, use in (("eval", "measure"), ("generate", "generate with"), ("check", "sample")):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert f"adapters to {use}" in said and "continue training" not in said


def test_places_that_no_loss_takes_are_for_gains_and_then_for_equal_rewards():
    before, after = evaluation(0, 0, 1, 0.5, 0, None), evaluation(1, 0.5, 1, 0.5, 0, 1)
    lines = lines_of_differences(TASKS, {"before": before, "adapter": after}, 5)
    assert titles(lines) == [
        "largest gains (2 of 2 tasks):",
        "equal rewards, the lowest first (3 of 3 tasks):",
    ]
    assert prompts(lines) == ["p0", "p1", "p4", "p3", "p2"]


def test_without_a_comparison_the_highest_and_the_lowest_rewards_are_shown():
    lines = lines_of_answers(TASKS, evaluation(0.1, 0.9, None, 0.5, 0.2, 0.7), 3)
    assert titles(lines) == ["highest rewards (2 of 5 tasks):", "lowest rewards (1 of 5 tasks):"]
    assert prompts(lines) == ["p1", "p5", "p0"]
    assert prompts(lines_of_answers(TASKS, evaluation(0, 1, 0, 1, 0, 1), 20)) == [
        *("p1", "p3", "p5", "p4", "p2", "p0")
    ]
    equal = lines_of_answers(TASKS[:3], evaluation(1, 1, 1), 2)
    assert titles(equal) == ["all 3 tasks have the reward 1 (2 of 3 tasks):"]
