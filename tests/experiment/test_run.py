"""`tp.run` and the commands start the same runs and leave the same directory."""

import json
from importlib import import_module

import pytest

import textpolicy as tp
from textpolicy.adapters.files.adapter_file import read_adapter_file
from textpolicy.cli import main
from textpolicy.config import TrainConfig, changed, read_toml
from textpolicy.errors import ConfigError
from textpolicy.experiment.event_lines import EventLines
from textpolicy.experiment.reward_address import with_reward_address
from textpolicy.runs import RunDirectory

SMALL = ["--groups-per-step", "2", "--group-size", "2", "--count", "4", "--eval-every", "1"]
SMALL_CONFIG = {
    "task": {"env": "add"},
    "rollout": {"groups_per_step": 2, "group_size": 2},
    "evaluation": {"count": 4, "every": 1},
}
PAID = """
import textpolicy as tp

def right(completion, answer):
    return float(completion == answer)

def brief(completion):
    return -len(completion)

both = tp.Rewards([right, brief])

@tp.reward(name="other")
def named(completion):
    return 1.0
"""
DIFFERENCE = "sampling/sampling_logp_difference/mean"
CLOCKS = ("time/", "memory/", "tokens_per_second", "iterations_per_second")


@pytest.fixture
def rows(tmp_path):
    """Return the path of a file of demonstrations."""
    path = tmp_path / "rows.jsonl"
    pairs = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(10, 30)]
    path.write_text("\n".join(map(json.dumps, pairs)))
    return str(path)


def names(directory):
    return sorted(path.relative_to(directory.path).as_posix() for path in directory.path.rglob("*"))


def metrics(directory):
    """Return the metrics of a run without times and memory."""
    lines = map(json.loads, directory.metrics.read_text().splitlines())
    return [{n: v for n, v in row.items() if not n.startswith(CLOCKS)} for row in lines]


def settings(directory):
    """Return the config of a run without its folder."""
    text = directory.config.read_text()
    return [line for line in text.splitlines() if not line.startswith("output = ")]


def assert_same_run(one, other):
    assert names(one) == names(other)
    assert metrics(one) == metrics(other)
    assert settings(one) == settings(other)
    for name in ("latest", "best"):
        arrays, others = (read_adapter_file(getattr(run, name)).arrays for run in (one, other))
        assert all((array == others[key]).all().item() for key, array in arrays.items())


@pytest.mark.slow
def test_a_run_from_python_leaves_the_same_directory_as_the_command(tmp_path):
    result = tp.run(SMALL_CONFIG | {"run": {"steps": 2}}, output=tmp_path / "python")
    command = RunDirectory(tmp_path / "command")
    assert (
        main(["train", "--env", "add", "--steps", "2", *SMALL, "--output", str(command.path)]) == 0
    )
    assert_same_run(result.directory, command)
    assert (result.ended, result.steps, result.after.count) == ("finished", 2, 4)
    assert result.after.value == metrics(command)[-1]["eval/reward"]


@pytest.mark.slow
def test_a_supervised_run_from_python_leaves_the_same_directory_as_the_command(tmp_path, rows):
    config = {"data": {"source": rows}, "trainer": {"iterations": 3}, "run": {"eval_every": 2}}
    result = tp.run(config, output=tmp_path / "python")
    command = RunDirectory(tmp_path / "command")
    options = ["--data", rows, "--iterations", "3", "--eval-every", "2"]
    assert main(["sft", *options, "--output", str(command.path)]) == 0
    assert_same_run(result.directory, command)
    assert (result.ended, result.steps, result.after.name) == ("finished", 3, "validation loss")


@pytest.mark.slow
def test_both_kinds_of_run_have_one_layout(tmp_path, rows):
    config = {"data": {"source": rows}, "trainer": {"iterations": 2}}
    supervised = tp.run(config, output=tmp_path / "sft").directory
    learned = tp.run(SMALL_CONFIG | {"run": {"steps": 2}}, output=tmp_path / "rl").directory
    common = {"config.toml", "metrics.jsonl", "report.html", "checkpoints/00000002.safetensors"}
    common |= {"adapters/latest.safetensors", "adapters/best.safetensors"}
    assert common <= set(names(supervised)) and common <= set(names(learned))


@pytest.mark.slow
def test_events_come_in_order_and_a_listener_can_stop_the_run(tmp_path):
    events = []

    def listen(event):
        events.append((event.kind, event.step))
        return tp.Progress.STOP if event.kind == "step" else tp.Progress.MORE

    result = tp.run(SMALL_CONFIG | {"run": {"steps": 3}}, output=tmp_path / "run", on_event=listen)
    assert (result.ended, result.steps, result.after) == ("stopped", 1, None)
    told = [("start", 0), ("measurement", 0), ("step", 1), ("measurement", 1)]
    assert [event for event in events if event[0] != "note"] == told


def test_a_run_without_a_listener_says_on_standard_error_what_it_does(tmp_path, capfd):
    config = {"task": {"env": "add"}, "run": {"steps": 1}, "trainer": {"lr": 1e-5}}
    config |= {"rollout": {"groups_per_step": 1, "group_size": 2}, "sampling": {"max_tokens": 2}}
    result = tp.run(config | {"evaluation": {"count": 2}}, output=tmp_path / "run")
    out, err = capfd.readouterr()
    assert not out and "the learning rate is 1e-05" in err.lower()
    assert "step 1/1: reward" in err and f"before  {result.before}" in err


def test_of_many_steps_one_every_five_seconds_is_written(capsys):
    now = 0.0
    lines = EventLines(clock=lambda: now)
    for step in range(1, 12):
        lines(tp.RunEvent(kind="step", step=step, text=f"step {step}"))
        now += 1.0
    lines(tp.RunEvent(kind="doubt", step=11, text="a \x1b doubt"))
    assert capsys.readouterr().err.splitlines() == ["step 1", "step 6", "step 11", "a \\x1b doubt"]


def test_a_wrong_listener_is_named_before_training_begins_and_a_listener_is_alone(tmp_path, capfd):
    told: list[str] = []

    def listen(event):
        told.append(event.kind)
        return 3

    with pytest.raises(ConfigError, match="the callback on_event returned 3"):
        tp.run(SMALL_CONFIG | {"run": {"steps": 1}}, output=tmp_path / "run", on_event=listen)
    assert len(told) == 1 and told != ["step"]
    assert not any(capfd.readouterr())


@pytest.mark.slow
def test_a_stopped_run_is_resumed_to_the_same_directory(tmp_path):
    whole = tp.run(SMALL_CONFIG | {"run": {"steps": 3}}, output=tmp_path / "whole").directory
    stop = lambda event: tp.Progress.STOP if event.kind == "step" else None  # noqa: E731
    config = SMALL_CONFIG | {"run": {"steps": 3}}
    first = tp.run(config, output=tmp_path / "stopped", on_event=stop)
    assert first.ended == "stopped"
    second = tp.run(resume=tmp_path / "stopped")
    assert second.ended == "finished"
    assert_same_run(second.directory, whole)


@pytest.mark.slow
def test_a_mapping_changes_a_resumed_run_and_a_change_of_numbers_needs_force(tmp_path):
    folder = tmp_path / "run"
    tp.run(SMALL_CONFIG | {"run": {"steps": 1}}, output=folder)
    with pytest.raises(ConfigError, match=r"trainer\.lr: 0\.0005 before, 0\.001 now"):
        tp.run({"trainer": {"lr": 1e-3}}, resume=folder)
    assert tp.run({"run": {"steps": 2}}, resume=folder, force=True).steps == 2
    assert read_toml(RunDirectory(folder).config, TrainConfig()).run.steps == 2


@pytest.mark.slow
def test_a_config_may_be_an_object_or_a_file(tmp_path):
    values = {"task.env": "add", "run.steps": 1, "evaluation.count": 4, "rollout.group_size": 2}
    config = changed(TrainConfig(), values | {"rollout.groups_per_step": 2})
    first = tp.run(config, output=tmp_path / "object").directory
    second = tp.run(first.config, output=tmp_path / "file").directory
    assert_same_run(first, second)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"no config is given.*run\(resume='runs/sort'\)"),
        ({}, "no task is given"),
        ({"data": {}}, "no data is given"),
        ({"tsak": {"env": "add"}}, r"tsak\.env is not a setting; did you mean task\.env"),
        ({"run": {"steps": 0}}, "run.steps is 0; expected"),
    ],
)
def test_a_wrong_config_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, config, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        tp.run(config)
    assert not any(tmp_path.rglob("*.toml"))


def test_a_reward_may_be_an_object_of_an_imported_file(tmp_path, monkeypatch):
    (tmp_path / "paid_rewards.py").write_text(PAID)
    monkeypatch.syspath_prepend(tmp_path)
    paid = vars(import_module("paid_rewards"))
    for name in ("right", "both", "named"):
        found = with_reward_address({"task": {"data": "rows.jsonl", "reward": paid[name]}})
        address = f"{tmp_path / 'paid_rewards.py'}:{name}"
        assert found == {"task": {"data": "rows.jsonl", "reward": address}}
    pairs = [{"prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(10, 30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    small = {"run": {"steps": 1}, "sampling": {"max_tokens": 2}, "evaluation": {"count": 2}}
    small |= {"rollout": {"groups_per_step": 1, "group_size": 2}}
    task = {"data": str(tmp_path / "rows.jsonl"), "reward": paid["both"]}
    result = tp.run({**small, "task": task}, output=tmp_path / "run")
    written = read_toml(result.directory.config, TrainConfig()).task.reward
    assert written == f"{tmp_path / 'paid_rewards.py'}:both"


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda completion: 0.0, "the function <lambda> that no imported file holds"),
        (tp.Rewards(lambda completion: 0.0), r'a tp.Rewards that .*"rewards\.py:NAME"'),
        ([len], r"is a list; .*tp\.Rewards\(\[one, other\]"),
    ],
)
def test_a_reward_that_no_file_holds_is_answered_with_what_to_write(reward, message):
    with pytest.raises(ConfigError, match=message):
        tp.run({"task": {"data": "rows.jsonl", "reward": reward}})


def test_a_config_file_that_is_not_utf_8_is_a_config_error(tmp_path):
    config = tmp_path / "config.toml"
    config.write_bytes(b'name = "\xe9"\n')
    with pytest.raises(ConfigError, match="not UTF-8"):
        tp.run(config)


def test_a_run_with_merged_adapters_samples_what_the_trainer_trains(tmp_path, capsys):
    options = {"run.output": tmp_path / "run", "run.steps": 4, "sampling.merge_adapters": True}
    values = options | {"trainer.lr": 0.01, "rollout.group_size": 4, "model.dtype": "float32"}
    result = tp.run(changed(TrainConfig(), {**_flat(SMALL_CONFIG), **values}))
    rows = metrics(result.directory)
    assert result.updates >= 2
    assert all(row[DIFFERENCE] < 1e-4 for row in rows if DIFFERENCE in row)
    assert sum(DIFFERENCE in row for row in rows) >= 2
    command = ["eval", "--env", "add", "--count", "4", "--adapter", str(tmp_path / "run"), "--json"]
    command += ["--dtype", "float32"]
    rewards = []
    for merge in ("--merge-adapters", "--no-merge-adapters"):
        assert main([*command, merge]) == 0
        rewards.append(json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"])
    assert rewards[0] == rewards[1]


def _flat(config):
    return {f"{name}.{key}": value for name, one in config.items() for key, value in one.items()}
