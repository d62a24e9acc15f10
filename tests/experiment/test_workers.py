"""Runs with rollout workers: equal numbers, signals, resumes, and no process that is left."""

import json
import os
import signal
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from tests.faults.killable_runs import exit_code_of, start_command
from tests.rollout.executors import builders
from textpolicy.adapters import shared_copy
from textpolicy.algorithms import grpo
from textpolicy.buffer import rollout_to_json
from textpolicy.cli import main
from textpolicy.config import TrainConfig, changed
from textpolicy.environments import load
from textpolicy.experiment.workers import NO_SWAP, BuildRunWorker
from textpolicy.generation.mlx_generation import create_policy
from textpolicy.loop import train_rl
from textpolicy.rollout.executors.crew import Crew
from textpolicy.rollout.executors.spawned import SpawnedWorkers
from textpolicy.runs import RunDirectory
from textpolicy.tracking.jsonl import read_metrics, read_rows
from textpolicy.training.optimizer import build_optimizer
from textpolicy.training.trainer import Trainer

SMALL = [
    *("--groups-per-step", "2", "--group-size", "4", "--count", "4"),
    *("--rank", "2", "--lr", "0.01"),
]
# Of a worker: on a busy machine too, an update ends while the worker still draws tokens.
SLOW_TOKENS = """
import os, time
from textpolicy.generation.engine import Engine

if os.environ["TRAINER"] != str(os.getpid()):
    Engine.step = lambda self, step=Engine.step: time.sleep(0.03) or step(self)
"""
REWARD = """
import os

def reward(completion, example):
    return float(len(completion) + example["sum"] % 2)
"""


def train(folder, workers, steps=22, transport=None):
    """Return the rollouts of each step, and the bytes of the last adapter."""
    model, adapters, tokenizer = builders.adapted_model()
    adapters.publish_path = folder / "adapters.safetensors"
    trainer = Trainer(model, grpo.compute_advantages, grpo.policy_loss, build_optimizer(1e-3))
    policy = create_policy(shared_copy(model), tokenizer, {"max_tokens": 4})
    crew = None
    if workers:
        transport = transport or SpawnedWorkers(builders.add_worker)
        crew = Crew(transport, workers, folder / "workers")
    seen = []
    train_rl(
        tasks=load("add").stream(0),
        reward=builders.obey,
        policy=policy,
        trainer=trainer,
        steps=steps,
        groups_per_step=2,
        group_size=4,
        seed=3,
        executor=crew,
        on_step=lambda report: seen.append(report.trained),
    )
    if crew:
        crew.close()
    steps_of_rollouts = [
        {group.task.id: list(map(rollout_to_json, group.rollouts)) for group in trained}
        for trained in seen
    ]
    return json.loads(json.dumps(steps_of_rollouts)), adapters.publish_path.read_bytes()


@pytest.fixture(scope="module")
def in_process(tmp_path_factory):
    return train(tmp_path_factory.mktemp("in_process"), 0)


@pytest.mark.slow
def test_one_worker_gives_the_run_of_one_process_to_the_bit(in_process, tmp_path):
    rollouts, adapter = train(tmp_path, 1)
    assert rollouts == in_process[0]
    assert adapter == in_process[1]
    versions = [rows[0]["version"] for step in rollouts for rows in step.values()]
    # A step whose rewards are all equal makes no version.
    assert versions == sorted(versions)
    assert len(set(versions)) >= 20


@pytest.mark.slow
def test_two_workers_give_the_groups_of_one_process(in_process, tmp_path):
    def tokens(steps):
        return [
            {task: [row["tokens"] for row in rows] for task, rows in step.items()} for step in steps
        ]

    rollouts, _ = train(tmp_path, 2)
    assert tokens(rollouts) == tokens(in_process[0])


def test_a_worker_of_a_run_is_built_from_its_config(tmp_path, load_tiny):
    """Its base is quantized, and its tasks get their environments back, as in the run itself."""
    config = changed(TrainConfig(), {"task.env": "hilo", "model.quantize": 4, "rollout.workers": 1})
    worker = BuildRunWorker(config)()
    (task,) = islice(load("hilo").stream(0), 1)
    attached = worker._attach(task)
    assert attached.env is not None
    assert "QuantizedLinear" in str(worker.policy.model)
    assert worker.policy.sampling.max_tokens == load("hilo").max_tokens


def test_a_worker_takes_new_adapters_between_tokens_if_the_config_says_so(load_tiny):
    for swap, follows in (("completions", False), ("tokens", True)):
        config = changed(TrainConfig(), {"task.env": "add", "rollout.swap": swap})
        assert (BuildRunWorker(config)().policy.newest_version is not None) is follows


def test_a_worker_merges_adapters_if_the_config_says_so(load_tiny):
    for merge in (False, True):
        options = {"task.env": "add", "model.dtype": "float32", "sampling.merge_adapters": merge}
        policy = BuildRunWorker(changed(TrainConfig(), options))().policy
        assert (policy.sampled_model() is not policy.model) is merge


@pytest.mark.slow
def test_a_run_with_new_adapters_between_tokens_trains_on_tokens_of_several_versions(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("TRAINER", str(os.getpid()))
    run = RunDirectory(tmp_path / "run")
    options = ["--env", "add", *SMALL, "--steps", "5", "--output", str(run.path)]
    options += ["--max-tokens", "40", "--temperature", "20", "--workers", "1"]
    (tmp_path / "my_reward.py").write_text(SLOW_TOKENS + REWARD)
    options += ["--reward", str(tmp_path / "my_reward.py")]
    assert main(["train", *options, "--max-staleness", "2", "--swap", "tokens"]) == 0
    rows = [row for row in read_metrics(run.metrics) if "loss" in row]
    assert len(rows) == 5
    assert any(row["staleness/mixed_tokens"] > 0 for row in rows)
    assert all(row["staleness/token_mean"] <= row["staleness/max"] <= 2 for row in rows)
    assert NO_SWAP not in capsys.readouterr().err


def test_a_run_says_that_between_tokens_means_nothing_without_workers_that_run_ahead(
    tmp_path, capsys
):
    options = ["--env", "add", *SMALL, "--steps", "1", "--output", str(tmp_path / "run")]
    assert main(["train", *options, "--swap", "tokens"]) == 0
    assert " ".join(NO_SWAP.split()) in " ".join(capsys.readouterr().err.split())


def processes_below(process):
    """Return the ids of all processes below one."""
    found = [process]
    for one in found:
        try:
            found += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
        except OSError:
            continue
    return found[1:]


def wait_for_rows(run, number, process):
    while len(read_metrics(run.metrics)) < number:
        assert process.exitcode is None
        time.sleep(0.05)


@pytest.mark.slow
def test_nothing_is_left_of_a_killed_run_and_another_number_of_workers_resumes_it(tmp_path):
    """The workers' rewards run in processes of their own, which end with the run too."""
    reward, log = tmp_path / "my_reward.py", tmp_path / "log"
    reward.write_text(REWARD)
    run = RunDirectory(tmp_path / "run")
    options = ["train", "--env", "add", *SMALL, "--steps", "1000", "--output", str(run.path)]
    options += ["--reward", str(reward), "--reward-timeout", "60", "--worker-deadline", "120"]
    options += ["--max-staleness", "1"]
    process, _ = start_command([*options, "--workers", "2"], log)
    wait_for_rows(run, 1, process)
    below = processes_below(process.pid)
    assert len(below) >= 8, "two guards, two workers, and their rewards' guards and processes"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{one}").exists() for one in below):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    resume = ["train", "--resume", str(run.path)]
    process, _ = start_command([*resume, "--workers", "1"], log)
    done = len(read_metrics(run.metrics))
    wait_for_rows(run, done + 1, process)
    os.kill(process.pid, signal.SIGTERM)
    assert exit_code_of(process) == 128 + signal.SIGTERM, log.read_text()
    steps = len(read_metrics(run.metrics))
    assert main([*resume, "--workers", "0", "--steps", str(steps + 1)]) == 0
    rows = [int(row["step"]) for row in read_metrics(run.metrics) if "loss" in row]
    assert rows == list(range(steps + 1))
    assert list(run.workers.iterdir()) == []
    trained = Counter(row["task"] for row in read_rows(run.samples))
    assert set(trained.values()) == {4}, "no task is trained on twice"
    assert len(trained) == 2 * len(rows)


DYING = """
import os

def make(rng):
    return f"{rng.randint(10, 99)}?", {}

def reward(completion, example):
    if os.getpid() != int(os.environ["TRAINER"]):
        os._exit(3)
    return 1.0
"""


@pytest.mark.slow
def test_a_run_whose_workers_die_again_and_again_can_be_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRAINER", str(os.getpid()))
    (tmp_path / "dying.py").write_text(DYING)
    options = ["--env", str(tmp_path / "dying.py"), *SMALL, "--max-tokens", "2"]
    run = tmp_path / "run"
    assert main(["train", *options, "--output", str(run), "--workers", "1"]) == os.EX_TEMPFAIL
    said = capsys.readouterr().err
    assert "rollout worker 1 exited with code 3, while it played a job of 2 tasks" in said
    assert "3 times in a row without finishing a job" in said
    assert "Begin it again with" in said


def test_a_plan_counts_the_copies_of_the_base(capsys):
    plan = ["train", "--env", "add", "--steps", "2", "--dry-run"]
    assert main([*plan, "--workers", "3"]) == 0
    said = capsys.readouterr().out
    assert "3 x" in said
    assert "each with its own copy of the base" in said


def test_a_plan_counts_no_workers_of_a_cluster_and_ray_needs_workers(capsys):
    plan = ["train", "--env", "add", "--steps", "2", "--dry-run"]
    for address, counted in (("10.0.0.1:6379", False), ("local", True)):
        assert main([*plan, "--workers", "3", "--ray", address]) == 0
        assert ("each with its own copy of the base" in capsys.readouterr().out) == counted
    assert main([*plan, "--ray", "local"]) == 2
    assert "ray is 'local' and workers is 0" in capsys.readouterr().err
