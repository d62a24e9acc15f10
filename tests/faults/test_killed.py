"""A run that is killed at any instant and resumed computes the numbers of an uninterrupted run."""

import errno
import hashlib
import os
import shutil
import signal
from itertools import count
from random import Random

import pytest

from tests.faults import killable_runs
from tests.faults.killable_runs import STEPS, context, exit_code_of, start
from tests.test_resume import MODES
from textpolicy.runs import RunDirectory
from textpolicy.tracking.jsonl import read_metrics

CLOCKS = ("time/", "memory/", "tokens_per_second")


def results_of(folder):
    """Return the hash of the last adapter, and the rows of metrics without times."""
    run = RunDirectory(folder)
    rows = [
        {name: value for name, value in row.items() if not name.startswith(CLOCKS)}
        for row in read_metrics(run.metrics)
    ]
    return hashlib.sha256(run.latest.read_bytes()).hexdigest(), rows


def hidden_files(folder):
    return sorted(path.name for path in folder.rglob(".*"))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Return a function that returns the results of an uninterrupted run."""
    known = {}

    def find(mode):
        if mode not in known:
            folder = tmp_path_factory.mktemp("whole_run")
            assert exit_code_of(start(killable_runs.train, folder, MODES[mode])) == 0
            known[mode] = results_of(folder)
        return known[mode]

    return find


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """Make a run that was stopped between two steps that train on the same generation."""
    folder = tmp_path_factory.mktemp("stopped_run")
    options = MODES["several steps a generation"]
    assert exit_code_of(start(killable_runs.train_until_step, folder, options, STEPS - 1)) == 0
    return folder


@pytest.fixture
def copy_run(stopped_run, tmp_path):
    """Return a function that makes a copy of the stopped run."""
    numbers = count()
    return lambda: shutil.copytree(stopped_run, tmp_path / str(next(numbers)))


def assert_resumes_to_the_same_numbers(folder, whole_run, mode="several steps a generation"):
    assert exit_code_of(start(killable_runs.train, folder, MODES[mode])) == 0
    assert results_of(folder) == whole_run(mode)
    assert [row["step"] for row in results_of(folder)[1]] == list(range(STEPS))
    assert hidden_files(folder) == [".running", ".textpolicy-run"]


@pytest.mark.proves("F2")
@pytest.mark.parametrize(
    ("after", "every"),
    [
        pytest.param(False, 3, marks=pytest.mark.slow, id="before each third"),
        pytest.param(False, 1, marks=pytest.mark.long, id="before"),
        pytest.param(True, 1, marks=pytest.mark.slow, id="after"),
    ],
)
def test_a_run_killed_at_any_system_call_of_a_save_can_be_resumed(
    whole_run, copy_run, attempts, after, every
):
    # Files are written only between an unlink and the next of these calls. After any other call the
    # files are the same as before the next call.
    calls = ("unlink",) if after else ("fsync", "replace", "unlink", "truncate")
    options = MODES["several steps a generation"]
    for number in count(1, every):
        folder = copy_run()
        code = exit_code_of(
            start(killable_runs.train_until_call, folder, options, calls, number, after)
        )
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert_resumes_to_the_same_numbers(folder, whole_run)
        attempts.add()
    # A resumed run publishes, and its step publishes and saves a checkpoint. Each of the three
    # flushes, renames, flushes again and looks for files to remove.
    assert number > (3 if after else 3 * 4)


@pytest.mark.proves("F2", "F11")
@pytest.mark.parametrize(
    "every",
    [
        pytest.param(4, marks=pytest.mark.slow, id="each fourth"),
        pytest.param(1, marks=pytest.mark.long, id="all"),
    ],
)
def test_a_run_killed_at_any_byte_of_a_file_resumes_from_the_last_checkpoint(
    whole_run, copy_run, attempts, every
):
    run = RunDirectory(copy_run())
    adapter = run.latest.stat().st_size
    saved = max(path.stat().st_size for path in run.checkpoints.iterdir())
    within = [Random(0).randrange(adapter, saved) for _ in range(2)]
    sizes = [0, 9, 500, adapter // 2, adapter - 1, adapter, *within, saved // 3]
    for size in sizes[::every]:
        folder = copy_run()
        before = {path: path.read_bytes() for path in RunDirectory(folder).checkpoints.iterdir()}
        code = exit_code_of(
            start(killable_runs.train_until_byte, folder, MODES["several steps a generation"], size)
        )
        assert code == -signal.SIGXFSZ
        assert all(path.read_bytes() == content for path, content in before.items())
        assert_resumes_to_the_same_numbers(folder, whole_run)
        attempts.add()


@pytest.mark.proves("F11")
@pytest.mark.slow
def test_a_full_disk_is_an_error_and_leaves_the_checkpoints_intact(whole_run, copy_run, attempts):
    run = RunDirectory(copy_run())
    adapter = run.latest.stat().st_size
    full = {adapter // 2: f"UnwritableError: {{}}/adapters/{run.latest.name} cannot be written"}
    full[2 * adapter] = f"UnwritableError: no checkpoint was saved after step {STEPS}"
    for size, expected in full.items():
        folder = copy_run()
        before = contents(folder)
        hear, say = context.Pipe(duplex=False)
        options = MODES["several steps a generation"]
        assert (
            exit_code_of(start(killable_runs.train_on_a_full_disk, folder, options, size, say)) == 0
        )
        error = hear.recv()
        assert error.startswith(expected.format(folder))
        assert os.strerror(errno.EFBIG) in error
        assert "on a disk with free space" in error
        assert contents(folder).items() >= before.items()
        assert hidden_files(folder) == [".running", ".textpolicy-run"]
        assert_resumes_to_the_same_numbers(folder, whole_run)
        attempts.add()


def contents(folder):
    """Return the bytes of every checkpoint by its name."""
    return {path.name: path.read_bytes() for path in RunDirectory(folder).checkpoints.iterdir()}
