"""Whatever Weights & Biases or trackio does, the numbers of the run are the same."""

import json
import math
import os
import sqlite3
import subprocess
import sys
import time

import pytest

from tests.wandb_server import history, records, serving
from textpolicy.adapters import AdapterConfig, AdapterContainer
from textpolicy.algorithms import grpo
from textpolicy.environments import load
from textpolicy.generation.mlx_generation import create_policy
from textpolicy.loop import train_rl
from textpolicy.runs import RunDirectory
from textpolicy.tracking.jsonl import read_metrics, read_rows
from textpolicy.tracking.open_tracker import ServiceOptions, open_tracker
from textpolicy.tracking.samples import sample_rows
from textpolicy.training.optimizer import build_optimizer
from textpolicy.training.trainer import Trainer

STEPS = 12
PATIENCE = 8.0
CONFIG = {"optimizer.lr": 0.01, "task.env": "add"}


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    yield
    # The wandb service would keep this test's address and key for the next test.
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


@pytest.fixture(scope="module")
def train(load_tiny, tmp_path_factory):
    """Return a function that trains a run, and returns its directory and the tracker's messages."""

    def go(name, services, *, on_step=lambda step: None):
        directory = RunDirectory(tmp_path_factory.mktemp("runs") / name)
        directory.adapters.mkdir(parents=True)
        model, tokenizer = load_tiny()
        adapters = AdapterContainer.from_model(model, AdapterConfig(rank=2), seed=1)
        adapters.publish_path = directory.latest
        said = []

        def see(report):
            samples = sample_rows(report.step, report.trained, report.advantages)
            tracker.write_samples(report.step, samples)
            tracker.write(report.step, report.metrics)
            on_step(report.step)

        tracker = open_tracker(directory, services, CONFIG, notice=said.append, patience=PATIENCE)
        train_rl(
            tasks=load("add").stream(0),
            reward=load("add").reward,
            policy=create_policy(model, tokenizer, {"max_tokens": 4}),
            trainer=Trainer(
                model, grpo.compute_advantages, grpo.policy_loss, build_optimizer(1e-2)
            ),
            steps=STEPS,
            groups_per_step=2,
            group_size=4,
            on_step=see,
        )
        started = time.monotonic()
        tracker.close()
        assert time.monotonic() - started < PATIENCE + 1
        return directory, said

    return go


@pytest.fixture(scope="module")
def plain(train):
    """Return the rows of a run without services."""
    directory, said = train("plain", ServiceOptions())
    assert said == []
    rows = timeless(read_metrics(directory.metrics))
    assert len(rows) == STEPS
    return rows


def timeless(rows):
    clocks = ("time/", "memory/", "tokens_per_second", "sink_errors")
    return [{n: v for n, v in row.items() if not n.startswith(clocks)} for row in rows]


def logged(directory):
    """Return the W&B file of a run and its rows, which its process may still be writing."""
    (file,) = directory.path.glob("wandb/*run-*/run-*.wandb")
    deadline = time.monotonic() + 10
    while len(rows := history(file)) < STEPS and time.monotonic() < deadline:
        time.sleep(0.05)
    return file, rows


def assert_same_rows(directory, rows):
    kept = read_metrics(directory.metrics)
    assert [row["_step"] for row in rows] == [row["step"] for row in kept] == list(range(STEPS))
    for row, known in zip(rows, kept, strict=True):
        for name, value in known.items():
            if name != "step":
                assert row[name] == value or (math.isnan(row[name]) and math.isnan(value)), name


def samples_in(folder):
    """Yield the rows of the increments of a sample table by column."""
    for path in sorted(folder.glob("media/table/*.json"), key=lambda p: int(p.name.split("_")[1])):
        table = json.loads(path.read_text())
        yield from (dict(zip(table["columns"], row, strict=True)) for row in table["data"])


@pytest.mark.proves("F14")
@pytest.mark.slow
def test_without_a_key_a_run_is_offline_and_has_every_row_of_the_metrics_file(train, plain):
    directory, said = train("offline", ServiceOptions(wandb="project"))
    folder = directory.path / "wandb"
    assert said == [f"W&B: the run is offline; upload it later: wandb sync {folder}/offline-run-*"]
    file, rows = logged(directory)
    assert_same_rows(directory, rows)
    assert timeless(read_metrics(directory.metrics)) == plain
    config = {
        item.key or ".".join(item.nested_key): json.loads(item.value_json)
        for record in records(file)
        for item in record.run.config.update
    }
    assert config.items() >= CONFIG.items()
    wanted = [row for row in read_rows(directory.samples) if row["step"] in (0, 10)]
    found = list(samples_in(file.parent / "files"))
    assert len(found) == len(wanted) == 16
    for row, known in zip(found, wanted, strict=True):
        for name in ("step", "group", "member", "prompt", "completion", "reward", "stop_reason"):
            assert row[name] == known[name]


@pytest.mark.proves("F14")
@pytest.mark.slow
def test_a_server_gets_every_row_the_table_and_the_adapters(train, plain, monkeypatch):
    with serving() as server:
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        directory, said = train("online", ServiceOptions(wandb="project", wandb_artifacts=True))
    assert said == []
    assert_same_rows(directory, [server.rows[step] for step in range(STEPS)])
    assert timeless(read_metrics(directory.metrics)) == plain
    kinds = [artifact["artifactTypeName"] for artifact in server.artifacts]
    assert "model" in kinds
    assert "wandb-run-incremental-table" in kinds


@pytest.mark.proves("F14")
@pytest.mark.slow
def test_a_server_that_dies_changes_no_row_and_leaves_a_whole_file_to_upload(
    train, plain, monkeypatch
):
    with serving() as server:
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)

        def on_step(step):
            deadline = time.monotonic() + 20
            if step == 3:
                while not server.artifacts and time.monotonic() < deadline:
                    time.sleep(0.05)
                server.shutdown()
                server.server_close()

        directory, said = train("dying", ServiceOptions(wandb="project"), on_step=on_step)
    assert len(said) == 2
    assert said[0].startswith("W&B: some samples or adapters are not uploaded: ")
    assert said[1].startswith("W&B: a part is not uploaded; upload it: wandb sync ")
    _, rows = logged(directory)
    assert_same_rows(directory, rows)
    assert server.artifacts
    assert len(server.rows) < STEPS
    assert timeless(read_metrics(directory.metrics)) == plain


@pytest.mark.proves("F14")
@pytest.mark.slow
def test_an_address_without_an_answer_makes_an_offline_run(train, plain, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    directory, said = train("dead", ServiceOptions(wandb="project"))
    assert len(said) == 1
    assert said[0].startswith("W&B: no server answered, so the run is offline (")
    assert said[0].endswith("/wandb/offline-run-*")
    assert timeless(read_metrics(directory.metrics)) == plain


@pytest.mark.slow
def test_trackio_gets_every_row(tmp_path):
    pytest.importorskip("trackio")
    program = """
import sys
from pathlib import Path
from textpolicy.runs import RunDirectory
from textpolicy.tracking.open_tracker import ServiceOptions, open_tracker
folder = Path(sys.argv[1])
with open_tracker(RunDirectory(folder), ServiceOptions(trackio="p"), {}, notice=print) as tracker:
    for step in range(5):
        tracker.write(step, {"reward": step / 4, "odd": float("nan")})
"""
    data = tmp_path / "data"
    run = tmp_path / "run"
    run.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", program, str(run)],
        env={**os.environ, "TRACKIO_DIR": str(data)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    with sqlite3.connect(data / "p.db") as database:
        rows = database.execute("select step, metrics from metrics order by step").fetchall()
    assert [(step, json.loads(row)["reward"]) for step, row in rows] == [
        (step, step / 4) for step in range(5)
    ]
