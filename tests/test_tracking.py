"""Sinks: what is written can be read back, without an account and without the library."""

import json
import struct
import time
from pathlib import Path

import pytest

from textpolicy.tracking.jsonl import MetricsFile
from textpolicy.tracking.sink import Sink
from textpolicy.tracking.wandb_run import WandbRun

ROWS = [{"reward": 0.25, "completions/mean_length": 4.5}, {"reward": 0.5, "time/step": 0.125}]
BLOCK = 32768


def test_a_metrics_file_has_one_whole_line_a_step_while_the_run_goes_on(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    sink = MetricsFile(path)
    for step, row in enumerate(ROWS):
        sink.write(step, row)
        lines = path.read_text().splitlines()
        assert json.loads(lines[-1]) == {"step": step, **row}
    sink.close()
    assert len(lines) == 2


def records(path: Path) -> list[bytes]:
    """The records of a W&B run file: LevelDB's log format after a header of seven bytes."""
    data, found, position, parts = path.read_bytes(), [], 7, b""
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            found.append(parts)
            parts = b""
    return found


@pytest.mark.slow
def test_a_run_without_a_key_is_kept_offline_row_for_row(tmp_path, monkeypatch):
    from wandb.proto.wandb_internal_pb2 import Record

    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    sink = WandbRun("project", folder=tmp_path, config={"lr": 0.5})
    assert isinstance(sink, Sink)
    for step, row in enumerate(ROWS):
        sink.write(step, row)
    sink.close()

    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    rows, config = [], {}
    # W&B's own process writes the file, and may still be at it when `finish` returns.
    deadline = time.monotonic() + 10
    while True:
        found = [Record.FromString(data) for data in records(file)]
        if any(record.HasField("exit") for record in found) or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for record in found:
        if record.HasField("history"):
            items = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
            rows.append({name: json.loads(value) for name, value in items.items()})
        for item in record.run.config.update:
            config[item.key] = json.loads(item.value_json)
    assert [{n: row[n] for n in kept} for row, kept in zip(rows, ROWS, strict=True)] == ROWS
    assert [row["_step"] for row in rows] == [0, 1]
    assert config["lr"] == 0.5
