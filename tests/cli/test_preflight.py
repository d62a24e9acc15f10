"""A run that cannot work here is refused before a model is loaded or anything is written."""

import json
import re
import shutil
import subprocess
import sys
import time

import mlx.core as mx
import pytest

import textpolicy as tp
from textpolicy.cli import main
from textpolicy.config import SFTConfig, TrainConfig, changed
from textpolicy.environments import load
from textpolicy.errors import ConfigError
from textpolicy.experiment import preflight
from textpolicy.experiment.preflight import find_problems
from textpolicy.experiment.run_size import SizeEstimator
from textpolicy.machine import memory_bytes, size_text

SMALL = ["--groups-per-step", "2", "--group-size", "2", "--count", "2", "--steps", "1"]


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """Return an empty working directory."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def rows(tmp_path):
    """Return the path of a file of demonstrations."""
    path = tmp_path / "rows.jsonl"
    pairs = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(10, 30)]
    path.write_text("\n".join(map(json.dumps, pairs)))
    return str(path)


def test_a_dry_run_shows_the_numbers_by_which_the_start_decides(failure, empty, capsys):
    beyond = ["train", "--env", "add", "--group-size", "1000000000"]
    message = failure(*beyond, code=2).partition(": ")[2].removesuffix("\n")
    assert main([*beyond, "--dry-run", "--json"]) == 2
    data = json.loads(capsys.readouterr().out)
    assert f"the run needs about {size_text(data['memory_bytes'])} of memory" in message
    assert data["machine_bytes"] == memory_bytes() and data["fits"] is False
    assert main([*beyond, "--dry-run"]) == 2
    shown = capsys.readouterr().out
    refusal = message.partition(". To start")[0]
    assert "REFUSED" in shown and refusal in shown


def test_a_run_that_is_refused_is_not_measured_either(empty, capsys):
    beyond = ["train", "--env", "add", "--groups-per-step", "1000000000", "--dry-run", "--measure"]
    started = time.monotonic()
    assert main(beyond) == 2
    assert time.monotonic() - started < 10 and "REFUSED" in capsys.readouterr().out


@pytest.mark.slow
def test_merged_weights_are_counted_and_the_advice_leaves_them_out(empty, monkeypatch):
    chosen = {"trainer.checkpoint_gradients": True, "sampling.merge_adapters": True}
    merging = changed(TrainConfig(), {"task.env": "add", **chosen})
    plain = changed(merging, {"sampling.merge_adapters": False})
    estimator = SizeEstimator(merging, load("add"))
    without, whole = map(estimator.estimate, (plain, merging))
    merged = whole.memory.arrays["merged weights"].bytes
    assert whole.memory_bytes - without.memory_bytes == merged > 0
    of_workers = [
        estimator.estimate(changed(one, {"rollout.workers": 2})).worker_bytes
        for one in (plain, merging)
    ]
    assert of_workers[1] - of_workers[0] == merged
    monkeypatch.setattr(preflight, "memory_bytes", lambda: without.memory_bytes)
    assert not [*find_problems(estimator, plain, without, empty)]
    (problem,) = find_problems(estimator, merging, whole, empty)
    assert problem.endswith("This would fit: --no-merge-adapters")


@pytest.mark.parametrize("other", ["--dtype=bfloat16", "--quantize=4"])
def test_merging_into_weights_that_are_not_float32_is_refused_before_a_run(failure, empty, other):
    for dry in ([], ["--dry-run"]):
        message = failure("train", "--env", "add", *SMALL, "--merge-adapters", other, *dry, code=2)
        assert "merge_adapters is on, and 14 of 14 adapted weights are not float32" in message
    assert not any(empty.iterdir())


def test_limits_warn_starts_the_run_all_the_same(empty, capsys):
    beyond = ["--keep-checkpoints", "1000000000", "--output", "run"]
    assert main(["train", "--env", "add", *SMALL, *beyond]) == 2
    assert "1,000,000,001 checkpoints" in capsys.readouterr().err
    assert list(empty.iterdir()) == []
    assert main(["train", "--env", "add", *SMALL, *beyond, "--limits", "warn"]) == 0
    assert "because of --limits warn" in capsys.readouterr().err


@pytest.mark.slow
def test_limits_warn_counts_for_sft_too(rows, empty, capsys):
    beyond = ["sft", "--data", rows, "--batch-size", "1000000000", "--dry-run"]
    assert main(beyond) == 2
    assert main([*beyond, "--limits", "warn"]) == 0
    assert "REFUSED" not in capsys.readouterr().out.rpartition("limits = ")[2]


@pytest.mark.slow
def test_a_resumed_run_may_change_what_its_limits_do(empty):
    assert main(["train", "--env", "add", *SMALL, "--output", "run"]) == 0
    assert main(["train", "--resume", "run", "--limits", "warn"]) == 0


def test_a_prompt_too_long_for_the_model_is_refused_at_once(failure, empty, tmp_path):
    path, reward = tmp_path / "rows.jsonl", tmp_path / "reward.py"
    pairs = [("word " * 9000, "1"), *((f"{n}+1=", str(n + 1)) for n in range(20))]
    path.write_text("\n".join(json.dumps({"prompt": p, "answer": a}) for p, a in pairs))
    reward.write_text("def reward(completion, answer):\n    return float(completion == answer)\n")
    started = time.monotonic()
    message = failure("train", "--data", str(path), "--reward", str(reward), code=2)
    assert time.monotonic() - started < 10
    assert "the longest prompt has 27,009 tokens" in message
    assert "context holds 1,024 tokens" in message
    assert list(empty.iterdir()) == []


def test_a_completion_longer_than_the_model_s_context_is_refused(failure, empty):
    message = failure("train", "--env", "add", "--max-tokens", "1024", code=2)
    assert "lower --max-tokens" in message


@pytest.mark.parametrize("command", ["train", "sft"])
@pytest.mark.parametrize(
    ("flag", "named"), [("--model", "no-such-model"), ("--adapter", "no/adapter.safetensors")]
)
def test_a_model_or_adapter_that_is_not_there_leaves_no_folder(
    command, flag, named, failure, empty, rows
):
    task = ["--env", "add"] if command == "train" else ["--data", rows]
    assert named in failure(command, *task, flag, named, code=2)
    assert list(empty.iterdir()) == []


@pytest.fixture
def model_without_weights(tiny, tmp_path):
    """Return the folder of a model whose weights are lost: loading it is an error."""
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    return str(tmp_path / "model")


@pytest.mark.parametrize(
    ("module", "flags"),
    [("tensorboardX", ["--tensorboard"]), ("trackio", ["--trackio", "mine"])],
)
@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_missing_package_of_a_service_is_noticed_before_anything_is_loaded(
    command, module, flags, failure, empty, rows, model_without_weights, monkeypatch
):
    monkeypatch.setitem(sys.modules, module, None)
    task = ["--env", "add"] if command == "train" else ["--data", rows]
    message = failure(command, *task, "--model", model_without_weights, *flags, code=2)
    assert f"pip install 'textpolicy[{flags[0].removeprefix('--')}]'" in message
    assert list(empty.iterdir()) == []


def test_a_missing_key_of_wandb_is_noticed_before_the_model_is_loaded(
    failure, empty, model_without_weights, monkeypatch
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    model = ["--model", model_without_weights, "--output", "run"]
    message = failure("train", "--env", "add", *SMALL, "--wandb", "mine", *model)
    assert message.index("W&B: there is no API key") < message.index("textpolicy train: ")


def test_sft_refuses_data_that_is_not_there_in_a_dry_run_too(failure, empty):
    for more in ([], ["--dry-run"]):
        assert "no/rows.jsonl" in failure("sft", "--data", "no/rows.jsonl", *more, code=2)
    assert "no data is given" in failure("sft", "--dry-run", code=2)
    assert list(empty.iterdir()) == []


def test_a_dry_run_of_sft_shows_rows_memory_and_disk(rows, empty, capsys):
    assert main(["sft", "--data", rows, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "20, of up to" in shown
    for name in ("weights", "adapters", "optimizer", "training", "machine", "disk"):
        assert re.search(rf"^{name} +", shown, re.MULTILINE)
    assert "MB of memory at its peak (estimated)" in shown and "no run was started" in shown
    assert list(empty.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("batch", [4, 16])
def test_the_estimate_of_supervised_training_is_near_the_measured_peak(batch, rows, tmp_path):
    config = {"data": {"source": rows}, "trainer": {"iterations": 3, "batch_size": batch}}
    settings = {"data.source": rows, "trainer.batch_size": batch}
    planned = changed(SFTConfig(), settings)
    estimate = SizeEstimator(planned, None).estimate(planned).peaks["training"]
    peaks = []
    # Models of earlier tests may still be there.
    before = mx.get_active_memory()
    result = tp.run(
        config | {"run": {"steps_per_report": 1}},
        output=tmp_path / "run",
        on_event=lambda event: peaks.append(event.metrics.get("memory/peak_gb", 0)),
    )
    assert result.steps == 3
    assert 0.5 < estimate / (1e9 * max(peaks) - before) < 2


@pytest.mark.slow
def test_the_estimate_of_completions_is_near_what_they_take():
    import tracemalloc
    from itertools import islice

    environment = load("add")
    policy = tp.create_policy(*tp.load_model("tiny"), {"max_tokens": 60})
    tasks = list(islice(environment.stream(0), 34))
    tp.collect(tasks[:2], policy, environment.reward, group_size=2, seed=0)
    tracemalloc.start()
    groups = tp.collect(tasks[2:], policy, environment.reward, group_size=8, seed=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    tokens = sum(len(rollout.tokens) for rollout in rollouts) / len(rollouts)
    from textpolicy.generation.policy import rollout_bytes

    assert 0.5 < rollout_bytes(round(tokens)) * len(rollouts) / peak < 2


def test_a_policy_refuses_more_completions_than_memory_holds(failure):
    policy = tp.create_policy(*tp.load_model("tiny"), {"max_tokens": 6})
    with pytest.raises(ConfigError, match=r"10,000,000,000 completions of up to 6 tokens need"):
        policy.generate(["1+1="], n=10**10)
    assert "Sample fewer" in failure("generate", "--prompt", "x", "-n", str(10**10), code=2)


@pytest.mark.slow
def test_a_limit_of_the_process_is_a_limit_of_its_memory():
    half = memory_bytes() // 2
    program = (
        f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({half}, {half}));"
        "from textpolicy.cli import main; main(['doctor', '--json'])"
    )
    shown = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert json.loads(shown.stdout)["memory_bytes"] == half


def test_the_longest_rows_of_data_are_measured_whichever_part_they_are_in(rows, tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text("def reward(completion):\n    return 0.0\n")
    settings = {"task.data": rows, "task.reward": str(reward)}
    config = changed(TrainConfig(), settings)
    from textpolicy.experiment.tasks import find_task

    environment, _ = find_task(config.task, config.run.seed)
    with open(rows, "a") as file:
        file.write("\n" + json.dumps({"prompt": "7+" * 100 + "7=", "completion": "x"}))
    longer, _ = find_task(config.task, config.run.seed)
    short, long = (SizeEstimator(config, one).lengths for one in (environment, longer))
    assert long.prompt > short.prompt + 100


def test_few_held_out_tasks_are_noted_by_train_and_by_eval(empty, capsys):
    assert main(["train", "--env", "add", *SMALL, "--output", "run"]) == 0
    assert "Only 2 tasks are measured" in capsys.readouterr().err
    assert main(["eval", "--env", "add", "--count", "4"]) == 0
    assert "Only 4 tasks are measured" in capsys.readouterr().out
