"""metrics.jsonl and samples.jsonl: rows come back equal, and no damage of a file ends a reader."""

import json
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from tests.strategies import (
    ANY_TEXTS,
    FLOATS,
    JSON,
    JSON_LIKE,
    JSON_TABLES,
    examples,
    rollouts,
    same_number,
)
from textpolicy.tracking.jsonl import RunFiles, drop_rows_from, read_metrics, read_rows
from textpolicy.tracking.report.runs import choose_samples, read_run
from textpolicy.tracking.samples import sample_rows
from textpolicy.types import RolloutGroup, Task

NAMES = ANY_TEXTS.map(lambda name: f"metric/{name}")
METRICS = st.dictionaries(NAMES, st.floats(), max_size=4)
STEPS = st.integers(0, 5)


def encoded(row: object) -> bytes:
    return json.dumps(row).encode() + b"\n"


# Rows of anybody: numbers of any size, values of any kind, known names among them.
KNOWN = st.sampled_from(
    ["reward", "loss", "time/step", "time/generate", "num_tokens", "alarm/x", "group", "prompt"]
)
ODD_ROWS = st.builds(
    lambda step, rest: {"step": step, **rest},
    STEPS | st.integers() | st.just(10**400),
    st.dictionaries(
        KNOWN | ANY_TEXTS,
        JSON | FLOATS | st.sampled_from([10**400, 1.7e308, "NaN", "Infinity"]),
        max_size=5,
    ),
)
LINES = st.one_of(
    ODD_ROWS.map(encoded),
    ODD_ROWS.map(encoded),
    st.binary(max_size=30).map(lambda line: line + b"\n"),
    JSON_LIKE.map(lambda text: text.encode(errors="replace")),
    JSON_TABLES.map(encoded),
)
FILES = st.lists(LINES, max_size=6).map(b"".join)


@given(st.lists(st.tuples(STEPS, METRICS), max_size=5))
@examples(0.5)
def test_metrics_are_read_back_merged_by_step(tmp_path: Path, written):
    written = sorted(written, key=lambda pair: pair[0])
    files = RunFiles(tmp_path / "metrics.jsonl")
    expected: dict[int, dict] = {}
    for step, metrics in written:
        files.write(step, metrics)
        expected.setdefault(step, {"step": step}).update(metrics)
    files.close()
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert [row.keys() for row in found] == [row.keys() for row in expected.values()]
    for row, own in zip(found, expected.values(), strict=True):
        assert all(same_number(float(row[name]), float(own[name])) for name in own)


@given(st.lists(rollouts(st.integers(0, 9)), min_size=1, max_size=3), ANY_TEXTS, STEPS, st.data())
@examples(0.5)
def test_samples_are_read_back_equal(tmp_path: Path, members, prompt, step, data):
    task = Task(id=data.draw(ANY_TEXTS), prompt=prompt)
    advantages = [data.draw(st.none() | FLOATS) for _ in members]
    rows = sample_rows(step, [RolloutGroup(task=task, rollouts=members)], [advantages])
    path = tmp_path / "samples.jsonl"
    files = RunFiles(tmp_path / "metrics.jsonl", path)
    files.write_samples(step, rows)
    files.close()
    assert list(read_rows(path)) == rows
    assert [row["completion"] for row in rows] == [one.completion for one in members]


@given(FILES)
def test_a_reader_returns_the_whole_rows_of_any_file(tmp_path: Path, content):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    assert all(type(row["step"]) is int for row in read_rows(path))
    merged = read_metrics(path)
    assert len({row["step"] for row in merged}) == len(merged)
    for row in merged:
        assert all(isinstance(row[name], float) for name in row if name != "step")


@given(FILES, STEPS)
def test_rows_of_later_steps_and_damage_are_dropped_and_nothing_else(tmp_path: Path, content, step):
    path, copy = tmp_path / "metrics.jsonl", tmp_path / "metrics.damaged.jsonl"
    copy.unlink(missing_ok=True)
    path.write_bytes(content)
    kept = [row for row in read_rows(path) if row["step"] < step]
    damage = drop_rows_from(path, step)
    assert list(read_rows(path)) == kept
    assert path.read_bytes().endswith(b"\n") or not kept
    assert (copy.read_bytes() == content) if damage else not copy.exists()
    assert drop_rows_from(path, step) is None and list(read_rows(path)) == kept


@given(FILES, FILES, st.integers(0, 2000))
@example(encoded({"step": 10**400}), encoded({"step": 10**400}), 100)
@example(b"".join(encoded({"step": i, "reward": 1.7e308}) for i in range(20)), b"", 100)
@example(encoded({"step": 1, "time/step": 1.0, "time/generate": "NaN"}), b"", 100)
def test_the_report_reads_any_run(tmp_path: Path, metrics, samples, limit):
    (tmp_path / "metrics.jsonl").write_bytes(metrics)
    (tmp_path / "samples.jsonl").write_bytes(samples)
    run = read_run(tmp_path, sample_bytes=limit)
    json.dumps(run, allow_nan=False)
    chosen, total = choose_samples(tmp_path / "samples.jsonl", limit)
    assert total == len(list(read_rows(tmp_path / "samples.jsonl"))) >= len(chosen)
