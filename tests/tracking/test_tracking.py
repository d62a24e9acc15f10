"""Files of a run can be read back, and a failing sink does not change the run."""

import json
import struct
import time
import tracemalloc
from threading import Event

import mlx.core as mx
import numpy as np
import pytest

from textpolicy.errors import ConfigError
from textpolicy.runs import RunDirectory
from textpolicy.tracking.jsonl import RunFiles, read_metrics, read_rows
from textpolicy.tracking.open_tracker import ServiceOptions, open_tracker, tracking_id
from textpolicy.tracking.samples import first_whole_groups, sample_line, sample_rows
from textpolicy.tracking.sink import BackgroundSink, Sink
from textpolicy.tracking.tensorboard_run import TensorBoardRun
from textpolicy.tracking.tracker import Tracker
from textpolicy.tracking.values import to_floats
from textpolicy.types import Rollout, RolloutGroup, Sampling, StopReason, Task, Turn
from textpolicy.untrusted.bounds import MAX_ROW_BYTES

ROWS = [{"reward": 0.25, "completions/mean_length": 4.5}, {"reward": 0.5, "time/step": 0.125}]
INF = float("inf")
# An escape code, a line separator, markup, a lone surrogate and a NUL.
NASTY = "\x1b[2J\u2028</script><b>&amp;\ud800\x00\r\n\t漢"


def rollout(completion="5", **fields):
    plain = {
        "tokens": [1, 2, 3],
        "mask": [False, True, True],
        "logprobs": [0.0, -1.0, -1.0],
        "completion": completion,
        "reward": 1.0,
        "rewards": {"right": 1.0},
        "stop_reason": StopReason.STOP_TOKEN,
        "sampling": Sampling(),
        "version": 3,
    }
    return Rollout(**(plain | fields))


def group(*rollouts, prompt="2+3="):
    return RolloutGroup(task=Task(id="t1", prompt=prompt), rollouts=rollouts)


class Recorder:
    """A sink that keeps its rows and samples, and calls `write` and `close` if given."""

    def __init__(self, write=lambda step: None, close=lambda: None):
        self.rows, self.samples, self.closed = {}, {}, False
        self._write, self._close = write, close

    def write(self, step, metrics):
        self._write(step)
        self.rows[step] = metrics

    def write_samples(self, step, samples):
        self.samples[step] = list(samples)

    def close(self):
        self._close()
        self.closed = True


def failing(*arguments):
    raise OSError("No space left\non device")


def test_every_kind_of_number_becomes_a_float_and_the_rest_is_named():
    metrics, left_out = to_floats(
        {
            "int": 3,
            "bool": True,
            "numpy": np.float32(0.5),
            "zero-dimensional": np.array(2),
            "mlx": mx.array(0.25),
            "bfloat16": mx.array(1.5, mx.bfloat16),
            "nested": {"a": 1, "b": {"c": mx.array([4.0])}},
            "several": mx.array([1, 2, 3, 6]),
            "list": [1.0, 3.0],
            "text": "no",
            "none": None,
            "empty": [],
            "ragged": [[1], [1, 2]],
            "complex": np.array([1j]),
        }
    )
    assert all(type(value) is float for value in metrics.values())
    assert left_out == ["text", "none", "empty", "ragged", "complex"]
    spread = {"several/mean": 3, "several/std": 3.5**0.5, "several/min": 1, "several/max": 6}
    spread |= {"list/mean": 2, "list/std": 1, "list/min": 1, "list/max": 3}
    assert metrics == {
        **{"int": 3, "bool": 1, "numpy": 0.5, "zero-dimensional": 2, "mlx": 0.25, "bfloat16": 1.5},
        **{"nested/a": 1, "nested/b/c": 4},
        **spread,
    }


def test_a_metrics_file_has_one_whole_line_a_step_during_the_run(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    sink = RunFiles(path)
    assert isinstance(sink, Sink)
    for step, row in enumerate(ROWS):
        sink.write(step, row)
        lines = path.read_text().splitlines()
        assert json.loads(lines[-1]) == {"step": step, **row}
    sink.close()
    assert len(lines) == 2


def test_numbers_that_are_not_finite_are_valid_json_and_are_read_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = RunFiles(path)
    sink.write(0, {"nan": float("nan"), "up": INF, "down": -INF, "one": 1.0})
    sink.close()
    strict = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert strict == {"step": 0, "nan": "NaN", "up": "Infinity", "down": "-Infinity", "one": 1.0}
    (row,) = read_metrics(path)
    assert np.isnan(row.pop("nan"))
    assert row == {"step": 0, "up": INF, "down": -INF, "one": 1.0}


def test_rows_of_one_step_are_read_as_one(tmp_path):
    sink = RunFiles(tmp_path / "metrics.jsonl")
    sink.write(0, {"a": 1.0})
    sink.write(0, {"b": 2.0})
    sink.write(5, {"a": 3.0})
    sink.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 0, "a": 1.0, "b": 2.0},
        {"step": 5, "a": 3.0},
    ]
    assert list(read_rows(tmp_path / "elsewhere.jsonl")) == []


@pytest.mark.parametrize("tail", ["", '{"step": 1, "a', '{"step": 1, "a": 1}', "\x00\x00", "[]\n"])
@pytest.mark.parametrize("step", [0, 1, 3, 9])
def test_resuming_at_a_step_drops_its_rows_and_an_unfinished_line(tmp_path, step, tail):
    metrics, samples = tmp_path / "metrics.jsonl", tmp_path / "samples.jsonl"
    for path in (metrics, samples):
        lines = [json.dumps({"step": s, "text": "é"}) + "\n" for s in (0, 1, 1, 2, 3)]
        path.write_text("".join(lines) + tail)
    sink = RunFiles(metrics, samples, resume_step=step)
    sink.write(step, {"new": 1.0})
    sink.write_samples(step, [{"step": step}])
    sink.close()
    old = [s for s in (0, 1, 1, 2, 3) if s < step]
    assert [row["step"] for row in read_rows(metrics)] == [*old, step]
    assert [row["step"] for row in read_rows(samples)] == [*old, step]


@pytest.mark.parametrize("line", ["{garbage\n", '{"loss": 1}\n', '{"step": "1"}\n', "\x00\n"])
def test_resuming_keeps_rows_behind_a_damaged_line_and_the_file_as_it_was(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n' + line + '{"step": 2}\n{"step": 3}\n')
    before = path.read_bytes()
    files = RunFiles(path, resume_step=3)
    files.close()
    (damage,) = files.damage
    assert "metrics.jsonl was damaged" in damage and "metrics.damaged.jsonl" in damage
    assert path.read_text() == '{"step": 0}\n{"step": 2}\n'
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == before
    # Rows that the run repeats anyway may be damaged.
    path.write_bytes(before)
    files = RunFiles(path, resume_step=0)
    files.close()
    assert (path.read_bytes(), files.damage) == (b"", [])


def test_a_copy_of_the_rows_that_is_a_hard_link_stays_as_it_is(tmp_path):
    path, backup = tmp_path / "metrics.jsonl", tmp_path / "backup.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n')
    backup.hardlink_to(path)
    files = RunFiles(path, resume_step=1)
    files.write(1, {"new": 1.0})
    files.close()
    assert [row["step"] for row in read_rows(path)] == [0, 1]
    assert backup.read_text() == '{"step": 0}\n{"step": 1}\n'


@pytest.mark.parametrize("value", ["[1]", "{}", "null", '"text"', "1" + 400 * "0"])
def test_values_of_a_row_that_are_no_numbers_are_left_out(tmp_path, value):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "wrong": ' + value + ', "right": 1}\n' + 9999 * "[" + "\n")
    assert read_metrics(path) == [{"step": 0, "right": 1.0}]


def test_a_sample_row_has_the_exact_text_of_a_completion_and_all_its_numbers(tmp_path):
    said = rollout(NASTY, rewards={"right": 0.0, "short": -INF}, reward=0.0, error="timeout")
    rows = sample_rows(7, [group(rollout(), said, prompt=NASTY)], [[0.5, None]])
    sink = RunFiles(tmp_path / "metrics.jsonl", tmp_path / "samples.jsonl")
    sink.write_samples(7, rows)
    sink.close()
    text = (tmp_path / "samples.jsonl").read_text()
    assert text.isascii()
    assert len(text.splitlines()) == 2
    first, second = read_rows(tmp_path / "samples.jsonl")
    assert first == {
        **{"step": 7, "group": 0, "member": 0, "task": "t1", "prompt": NASTY, "completion": "5"},
        **{"reward": 1.0, "rewards": {"right": 1.0}, "advantage": 0.5, "version": 3},
        **{"stop_reason": "stop_token", "tokens": 2},
    }
    assert second["completion"] == NASTY
    assert second["rewards"] == {"right": 0.0, "short": "-Infinity"}
    assert (second["advantage"], second["error"]) == (None, "timeout")


def test_a_sample_row_has_the_numbers_that_its_reward_reported_under_short_names():
    one = rollout(metrics={"rewards/mine/exact": 1.0, "env/turns": 2.0})
    two = rollout(metrics={"rewards/mine/exact": INF, "rewards/form/exact": 0.5})
    rows = sample_rows(0, [group(one, one)], [[0.5, 0.5]])
    assert [row["metrics"] for row in rows] == [{"exact": 1.0}, {"exact": 1.0}]
    # A name says the reward in every row of a step in which two rewards use it.
    rows = sample_rows(0, [group(one, two)], [[0.5, 0.5]])
    assert [row["metrics"] for row in rows] == [
        {"mine.exact": 1.0},
        {"mine.exact": "Infinity", "form.exact": 0.5},
    ]


def test_a_sample_of_an_episode_has_its_turns_and_a_chat_its_messages():
    replies = [{"role": "user", "content": "wrong"}]
    turns = [Turn(completion="4", reward=0.0, replies=replies), Turn(completion="5", reward=1.0)]
    chat = [{"role": "user", "content": "2+3="}]
    (row,) = sample_rows(0, [group(rollout(turns=turns), prompt=chat)], [[1.0]])
    assert row["prompt"] == chat
    assert row["turns"] == [
        {"completion": "4", "reward": 0.0, "replies": replies},
        {"completion": "5", "reward": 1.0, "replies": []},
    ]


def test_rewards_and_advantages_that_are_not_finite_are_texts_in_a_sample(tmp_path):
    turns = [Turn(completion="4", reward=INF), Turn(completion="5", reward=1.0)]
    rows = sample_rows(0, [group(rollout(turns=turns, reward=-INF))], [[float("nan")]])
    sink = RunFiles(tmp_path / "metrics.jsonl", tmp_path / "samples.jsonl")
    sink.write_samples(0, rows)
    sink.close()
    (row,) = read_rows(tmp_path / "samples.jsonl")
    assert (row["reward"], row["advantage"]) == ("-Infinity", "NaN")
    assert row["turns"][0]["reward"] == "Infinity"
    assert sample_line(row, 80).endswith("(reward -inf)")


def test_services_get_whole_groups_of_samples():
    samples = [{"group": g, "member": m} for g in range(3) for m in range(4)]
    assert first_whole_groups(samples, 9) == samples[:8]
    assert first_whole_groups(samples, 12) == samples
    assert first_whole_groups(samples, 3) == []


def test_a_failing_sink_is_named_once_counted_and_dropped_while_others_continue():
    said, good, bad = [], Recorder(), Recorder(write=failing)
    with Tracker([bad, good], notice=said.append) as tracker:
        for step, row in enumerate([*ROWS, {}]):
            tracker.write_samples(step, [])
            tracker.write(step, row)
    assert said == ["Recorder is switched off: OSError: No space left on device"]
    assert bad.rows == {}
    assert list(bad.samples) == [0]
    assert [good.rows[step]["sink_errors"] for step in range(3)] == [0, 1, 1]
    assert good.closed


def test_a_service_that_fails_is_named_once_and_closed():
    said, good, bad = [], Recorder(), Recorder(write=failing)
    services = [BackgroundSink("bad", lambda say: bad), BackgroundSink("good", lambda say: good)]
    with Tracker([], services, notice=said.append) as tracker:
        for step in range(20):
            tracker.write(step, {"reward": step})
    assert said == ["bad is switched off: OSError: No space left on device"]
    assert bad.closed
    assert [row["reward"] for row in good.rows.values()] == list(range(20))


def test_a_service_that_cannot_open_is_switched_off_after_its_messages_are_passed_on():
    said = []

    def open_sink(say):
        say("the run is offline")
        raise ConnectionError("no route")

    Tracker([], [BackgroundSink("W&B", open_sink)], notice=said.append).close()
    assert said == ["W&B: the run is offline", "W&B is switched off: ConnectionError: no route"]


@pytest.mark.slow
def test_a_hanging_service_neither_slows_the_run_nor_its_end():
    said, let_go = [], Event()
    hanging = BackgroundSink(
        "slow", lambda say: Recorder(write=lambda step: let_go.wait(30)), capacity=5
    )
    patient = BackgroundSink("stuck", lambda say: Recorder(close=lambda: let_go.wait(30)))
    started = time.monotonic()
    with Tracker([], [hanging, patient], notice=said.append, patience=1) as tracker:
        for step in range(10):
            tracker.write(step, {"reward": step})
    assert time.monotonic() - started < 2
    assert sorted(said) == [
        "slow is switched off: it fell 5 writes behind",
        "stuck is switched off: it did not finish in time, with 0 writes to go",
    ]
    let_go.set()


def test_the_first_groups_of_samples_are_written_and_without_groups_there_is_no_file(tmp_path):
    samples = [{"step": 0, "group": g, "member": m} for g in range(3) for m in range(2)]
    for groups, kept in ((None, samples), (2, samples[:4]), (0, [])):
        directory = RunDirectory(tmp_path / str(groups))
        with open_tracker(
            directory, ServiceOptions(), {}, notice=pytest.fail, sample_groups=groups
        ) as tracker:
            tracker.write_samples(0, samples)
        assert list(read_rows(directory.samples)) == kept
        assert directory.samples.exists() == bool(kept)


def test_a_run_resumed_without_samples_drops_the_samples_of_repeated_steps(tmp_path):
    directory = RunDirectory(tmp_path)
    rows = [{"step": step, "group": 0, "member": 0} for step in range(3)]
    for groups, resume_step in ((None, 0), (0, 2)):
        with open_tracker(
            directory,
            ServiceOptions(),
            {},
            notice=pytest.fail,
            resume_step=resume_step,
            sample_groups=groups,
        ) as tracker:
            for row in rows[resume_step:]:
                tracker.write_samples(row["step"], [row])
    assert list(read_rows(directory.samples)) == rows[:2]


def test_services_get_few_samples_and_files_get_all():
    file, service = Recorder(), Recorder()
    services = [BackgroundSink("service", lambda say: service)]
    with Tracker([file], services, notice=pytest.fail, samples_every=3, samples_rows=5) as tracker:
        samples = [{"group": g, "member": m} for g in range(2) for m in range(4)]
        for step in range(7):
            tracker.write_samples(step, samples)
    assert file.samples == dict.fromkeys(range(7), samples)
    assert service.samples == dict.fromkeys((0, 3, 6), samples[:4])


def test_a_metric_that_is_not_a_number_is_left_out_counted_and_named_once():
    said, sink = [], Recorder()
    with Tracker([sink], notice=said.append) as tracker:
        tracker.write(0, {"a": 1, "b": "text"})
        tracker.write(1, {"a": 2, "b": "text"})
    assert said == ["metric 'b' is not a number and was left out"]
    assert sink.rows == {step: {"a": step + 1, "sink_errors": 1} for step in (0, 1)}


def scalars(folder):
    """Yield tag, step and value of each scalar in an event file of (length, crc, record, crc)."""
    from tensorboardX.proto.event_pb2 import Event as Record

    (path,) = folder.glob("events.*")
    data, position = path.read_bytes(), 0
    while position < len(data):
        (length,) = struct.unpack_from("<Q", data, position)
        event = Record.FromString(data[position + 12 : position + 12 + length])
        position += 16 + length
        yield from ((value.tag, event.step, value.simple_value) for value in event.summary.value)


def test_tensorboard_files_hold_every_metric(tmp_path):
    pytest.importorskip("tensorboardX")
    sink = TensorBoardRun(tmp_path)
    assert isinstance(sink, Sink)
    for step, row in enumerate(ROWS):
        sink.write(step, row)
    sink.close()
    wanted = [(name, step, value) for step, row in enumerate(ROWS) for name, value in row.items()]
    assert list(scalars(tmp_path)) == wanted


def test_a_service_whose_package_is_missing_is_an_error_before_anything_is_written(
    tmp_path, monkeypatch
):
    # None in sys.modules makes the package impossible to import.
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(
        ConfigError, match=r"tensorboardX .* pip install 'textpolicy\[tensorboard\]"
    ):
        open_tracker(
            RunDirectory(tmp_path), ServiceOptions(tensorboard=True), {}, notice=pytest.fail
        )
    assert list(tmp_path.iterdir()) == []


def test_a_run_keeps_its_id_for_services(tmp_path):
    run, other = RunDirectory(tmp_path), RunDirectory(tmp_path / "other")
    other.path.mkdir()
    assert tracking_id(run) == tracking_id(run)
    assert tracking_id(other) != tracking_id(run)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"../../x"])
def test_a_damaged_id_file_is_replaced(tmp_path, content):
    (tmp_path / ".tracking-id").write_bytes(content)
    run = RunDirectory(tmp_path)
    assert tracking_id(run) == tracking_id(run) != ""


def test_a_line_that_never_ends_is_passed_over_and_not_held_in_memory(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.write(b'{"step": 0, "reward": 1.0}\n')
        file.seek(8 * MAX_ROW_BYTES)
        file.write(b'\n{"step": 1, "reward": 2.0}\n')
    tracemalloc.start()
    assert [row["step"] for row in read_metrics(path)] == [0, 1]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * MAX_ROW_BYTES
    # A resume says so, and keeps the rows around the line.
    files = RunFiles(path, resume_step=2)
    files.close()
    (damage,) = files.damage
    assert "metrics.jsonl was damaged" in damage
    assert path.read_bytes() == b'{"step": 0, "reward": 1.0}\n{"step": 1, "reward": 2.0}\n'
