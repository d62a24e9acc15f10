"""`textpolicy train` stopped by a signal or killed, and resumed to the same directory."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from textpolicy.adapters.files.adapter_file import read_adapter_file
from textpolicy.cli import main
from textpolicy.config import TrainConfig, read_toml
from textpolicy.errors import ConfigError
from textpolicy.runs import RunDirectory

RUN = [
    *("train", "--env", "add", "--steps", "12", "--count", "16", "--groups-per-step", "4"),
    *("--group-size", "4", "--eval-every", "5", "--lr", "0.002", "--schedule", "cosine"),
]
# Tests that run in the background are started with Ctrl-C ignored.
MAIN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from textpolicy.cli import main
raise SystemExit(main())
"""
COMMAND = [sys.executable, "-c", MAIN]


def rows(directory):
    """Return the metrics of each step, without times and memory."""
    unlike = ("time/", "memory/", "tokens_per_second")
    lines = map(json.loads, directory.metrics.read_text().splitlines())
    return [{n: v for n, v in line.items() if not n.startswith(unlike)} for line in lines]


def completions(directory):
    return [json.loads(line) for line in directory.samples.read_text().splitlines()]


def digests(directory):
    return {
        name: read_adapter_file(directory.adapters / f"{name}.safetensors").arrays
        for name in ("latest", "best")
    }


def assert_equal_results(one, other):
    assert rows(one) == rows(other)
    assert completions(one) == completions(other)
    for name, arrays in digests(one).items():
        for key, array in digests(other)[name].items():
            assert (array == arrays[key]).all().item(), (name, key)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = RunDirectory(tmp_path_factory.mktemp("whole") / "run")
    assert main([*RUN, "--output", str(directory.path)]) == 0
    return directory


def start_run(path, steps, *options):
    """Start a run in another process, and return the process after `steps` steps."""
    process = subprocess.Popen(
        [*COMMAND, *RUN, "--output", str(path), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = RunDirectory(path).metrics
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= steps):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    return process


@pytest.mark.slow
def test_a_run_leaves_files_that_can_be_read_without_the_code(whole):
    names = {path.relative_to(whole.path).as_posix() for path in whole.path.rglob("*")}
    assert {"config.toml", "metrics.jsonl", "samples.jsonl", "checkpoints", "adapters"} <= names
    assert {"adapters/latest.safetensors", "adapters/best.safetensors"} <= names
    # The versions that were evaluated: after 5 and 10 steps, and the last.
    kept = sorted(int(p.stem) for p in whole.adapters.iterdir() if p.stem.isdecimal())
    assert len(kept) == 3 and kept[-1] == read_adapter_file(whole.latest).version
    assert read_toml(whole.config, TrainConfig()).trainer.lr == 0.002
    one = completions(whole)[0]
    assert {"step", "prompt", "completion", "reward", "advantage", "version"} <= one.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_a_run_that_a_signal_stops_resumes_to_the_same_directory(tmp_path, whole, number, code):
    directory = RunDirectory(tmp_path / "run")
    process = start_run(directory.path, 3)
    os.kill(process.pid, number)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == code
    if number != signal.SIGKILL:
        assert f"resume with: textpolicy train --resume {directory.path}" in out
    assert len(rows(directory)) < len(rows(whole))
    assert main(["train", "--resume", str(directory.path)]) == 0
    assert_equal_results(directory, whole)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks /proc for handlers")
def test_a_signal_in_the_first_evaluation_leaves_a_run_that_can_be_resumed(tmp_path):
    process = start_run(tmp_path / "run", 0, "--count", "512")
    while not has_handler(process.pid, signal.SIGTERM):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "resume with: textpolicy train --resume" in out
    assert [row["step"] for row in rows(RunDirectory(tmp_path / "run"))] == [0]


def has_handler(pid, number):
    """Return whether the process has a handler for the signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return int(caught.split()[1], 16) >> (number - 1) & 1


@pytest.mark.slow
def test_other_tasks_are_refused_unless_forced(tmp_path, capsys):
    data, run = tmp_path / "rows.jsonl", str(tmp_path / "run")
    rows_of_tasks = [{"prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(12)]
    data.write_text("\n".join(map(json.dumps, rows_of_tasks)))
    (tmp_path / "mine.py").write_text("def reward(completion): return float(len(completion) % 3)")
    asked = ["train", "--data", str(data), "--reward", str(tmp_path / "mine.py"), "--count", "4"]
    assert main([*asked, "--steps", "1", "--groups-per-step", "4", "--output", run]) == 0
    others = [row | {"answer": "0"} for row in rows_of_tasks]
    data.write_text("\n".join(map(json.dumps, others)))
    assert main(["train", "--resume", run]) == 2
    assert "rows: rows.jsonl has changed" in capsys.readouterr().err
    assert main(["train", "--resume", run, "--force"]) == 0


@pytest.mark.slow
def test_a_finished_run_is_measured_again_and_nothing_else(whole, capsys):
    before = rows(whole)
    assert main(["train", "--resume", str(whole.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 12
    assert rows(whole) == before


@pytest.mark.slow
def test_another_config_is_refused_with_its_differences_unless_forced(whole, tmp_path, capsys):
    argv = ["train", "--resume", str(whole.path), "--lr", "0.5", "--beta", "0.1"]
    assert main(argv) == 2
    message = capsys.readouterr().err
    assert "trainer.lr: 0.002 before, 0.5 now" in message
    assert "algorithm.beta: 0.0 before, 0.1 now" in message
    assert "--force" in message
    # Options of tracking change no number.
    assert main(["train", "--resume", str(whole.path), "--tensorboard"]) == 0


@pytest.mark.slow
def test_a_moved_run_resumes_in_its_new_folder_and_in_no_other(tmp_path, capsys):
    small = ["--steps", "2", "--count", "4", "--groups-per-step", "2", "--group-size", "2"]
    start_run, moved, elsewhere = (tmp_path / name for name in ("start_run", "moved", "elsewhere"))
    assert main(["train", "--env", "add", *small, "--output", str(start_run)]) == 0
    start_run.rename(moved)
    resume = ["train", "--resume", str(moved)]
    assert main([*resume, "--output", str(elsewhere)]) == 2
    assert "is resumed in that folder" in capsys.readouterr().err
    assert main([*resume, "--output", str(moved)]) == 0
    assert main(resume) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path, capsys):
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert "holds no run to resume" in capsys.readouterr().err


@pytest.mark.slow
def test_a_forced_resume_uses_the_new_options(tmp_path, capsys):
    small = ["--steps", "4", "--count", "4", "--groups-per-step", "2", "--group-size", "2"]
    argv = ["train", "--env", "add", *small, "--output", str(tmp_path / "run")]
    assert main([*argv, "--checkpoint-every", "3", "--keep-checkpoints", "1"]) == 0
    directory = RunDirectory(tmp_path / "run")
    assert [path.stem for path in directory.checkpoints.iterdir()] == ["00000004"]
    more = ["--steps", "8", "--lr", "0.25", "--force"]
    assert main(["train", "--resume", str(directory.path), *more]) == 0
    assert [row["step"] for row in rows(directory)][-2:] == [7, 8]
    assert [row["learning_rate"] for row in rows(directory)[5:8]] == [0.25] * 3
    assert read_toml(directory.config, TrainConfig()).run.steps == 8


@pytest.mark.slow
def test_a_second_writer_is_refused(whole, capsys):
    with whole.lock():
        assert main(["train", "--resume", str(whole.path)]) == 2
    assert "is writing the run" in capsys.readouterr().err
    with pytest.raises(ConfigError), whole.lock(), whole.lock():
        pass


@pytest.mark.slow
def test_a_damaged_checkpoint_is_skipped(tmp_path, whole, capsys):
    directory = RunDirectory(tmp_path / "run")
    assert main([*RUN, "--output", str(directory.path)]) == 0
    newest = max(directory.checkpoints.iterdir())
    newest.write_bytes(newest.read_bytes()[:-1])
    assert main(["train", "--resume", str(directory.path)]) == 0
    assert "A damaged checkpoint was skipped" in capsys.readouterr().err
    assert_equal_results(directory, whole)


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
from textpolicy.cli import main
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_run_that_a_full_disk_ends_says_how_to_resume(tmp_path):
    path = str(tmp_path / "run")
    small = ["--count", "4", "--groups-per-step", "2", "--group-size", "2"]
    assert main(["train", "--env", "add", "--steps", "2", *small, "--output", path]) == 0
    more = ["train", "--resume", path, "--steps", "4"]
    full = [sys.executable, "-c", FULL_DISK, *more]
    ended = subprocess.run(full, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 75
    assert f"resume it with: textpolicy train --resume {path}" in ended.stderr
    assert main(more) == 0
    assert [row["step"] for row in rows(RunDirectory(tmp_path / "run"))] == [0, 1, 2, 3, 4]
