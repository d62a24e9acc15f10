"""A run that is killed at any instant and resumed computes the numbers of an uninterrupted run."""

import errno
import hashlib
import os
import shutil
import signal
import time
from itertools import count
from queue import Queue
from random import Random

import pytest

from tests.experiment import killable_runs
from tests.experiment.killable_runs import STEPS, context, exit_code_of, start
from tests.test_resume import MODES
from textpolicy.cli.signals import STOPPING, stopping
from textpolicy.runs import RunDirectory
from textpolicy.tracking.jsonl import read_metrics
from textpolicy.training.checkpoint import Checkpoints

CLOCKS = ("time/", "memory/", "tokens_per_second")
KILLS = 20


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
    """Return a function that returns the results and the seconds of an uninterrupted run."""
    known = {}

    def find(mode):
        if mode not in known:
            folder = tmp_path_factory.mktemp("whole_run")
            process, began = start_loaded(folder, mode), time.monotonic()
            assert exit_code_of(process) == 0
            known[mode] = results_of(folder), time.monotonic() - began
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
    assert results_of(folder) == whole_run(mode)[0]
    assert [row["step"] for row in results_of(folder)[1]] == list(range(STEPS))
    assert hidden_files(folder) == [".lock"]


def start_loaded(folder, mode):
    """Start a process, and return it when its model is loaded and the folder is untouched."""
    hear, say = context.Pipe(duplex=False)
    process = start(killable_runs.train_and_announce, folder, MODES[mode], say)
    assert hear.poll(60)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_run_killed_at_random_times_computes_the_same_numbers(whole_run, tmp_path, mode):
    random = Random(mode)
    expected, seconds = whole_run(mode)
    kills, folders = 0, count()
    folder = tmp_path / str(next(folders))
    while kills < KILLS / len(MODES):
        process = start_loaded(folder, mode)
        process.join(random.uniform(0, 0.7 * seconds))
        if process.exitcode is None:
            process.kill()
            kills += exit_code_of(process) == -signal.SIGKILL
        else:
            assert process.exitcode == 0
            assert results_of(folder) == expected
            folder = tmp_path / str(next(folders))
    assert_resumes_to_the_same_numbers(folder, whole_run, mode)


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_run_killed_at_any_system_call_of_a_save_can_be_resumed(whole_run, copy_run, after):
    # Files are written only between an unlink and the next of these calls. After any other call the
    # files are the same as before the next call.
    calls = ("unlink",) if after else ("fsync", "replace", "unlink", "truncate")
    options = MODES["several steps a generation"]
    for number in count(1):
        folder = copy_run()
        code = exit_code_of(
            start(killable_runs.train_until_call, folder, options, calls, number, after)
        )
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert_resumes_to_the_same_numbers(folder, whole_run)
    # A resumed run publishes, and its step publishes and saves a checkpoint. Each of the three
    # flushes, renames, flushes again and looks for files to remove.
    assert number > (3 if after else 3 * 4)


@pytest.mark.slow
def test_a_run_killed_at_any_byte_of_a_file_resumes_from_the_last_checkpoint(whole_run, copy_run):
    run = RunDirectory(copy_run())
    adapter = run.latest.stat().st_size
    saved = max(path.stat().st_size for path in run.checkpoints.iterdir())
    within = [Random(0).randrange(adapter, saved) for _ in range(2)]
    for size in [0, 9, 500, adapter // 2, adapter - 1, adapter, *within, saved // 3]:
        folder = copy_run()
        before = {path: path.read_bytes() for path in RunDirectory(folder).checkpoints.iterdir()}
        code = exit_code_of(
            start(killable_runs.train_until_byte, folder, MODES["several steps a generation"], size)
        )
        assert code == -signal.SIGXFSZ
        assert all(path.read_bytes() == content for path, content in before.items())
        assert_resumes_to_the_same_numbers(folder, whole_run)


@pytest.mark.slow
def test_a_full_disk_is_an_error_and_leaves_the_checkpoints_intact(whole_run, copy_run):
    run = RunDirectory(copy_run())
    adapter = run.latest.stat().st_size
    full = {adapter // 2: f"UnwritableError: {{}}/adapters/{run.latest.name} cannot be written"}
    full[2 * adapter] = f"TrainingError: no checkpoint was saved after step {STEPS}"
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
        assert hidden_files(folder) == [".lock"]
        assert_resumes_to_the_same_numbers(folder, whole_run)


def contents(folder):
    """Return the bytes of every checkpoint by its name."""
    return {path.name: path.read_bytes() for path in RunDirectory(folder).checkpoints.iterdir()}


# Signals


class WaitingRun:
    """A run in another process, which waits in its third step for `continue_step`."""

    def __init__(self, folder, *, hold=False):
        self.folder = folder
        self.connection, theirs = context.Pipe()
        self.process = start(
            killable_runs.train_and_wait_for_signals, folder, MODES["on policy"], hold, theirs
        )
        theirs.close()
        assert [self.hear() for _ in range(3)] == [1, 2, "in the third step"]

    def hear(self):
        assert self.connection.poll(60), "no message for 60 s"
        return self.connection.recv()

    def send(self, number):
        os.kill(self.process.pid, number)
        return self

    def continue_step(self):
        self.connection.send(None)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_first_signal_ends_the_run_after_the_current_step(whole_run, tmp_path, number, code):
    run = WaitingRun(tmp_path / "my run").send(number)
    assert run.hear() == (
        f"{number.name}: the run stops after this step and saves a checkpoint. "
        "A second signal ends it at once"
    )
    run.continue_step()
    assert run.hear() == 3
    assert exit_code_of(run.process) == code
    assert Checkpoints(RunDirectory(run.folder).checkpoints).newest().step == 3
    assert_resumes_to_the_same_numbers(run.folder, whole_run, "on policy")


@pytest.mark.slow
def test_a_second_signal_ends_the_process_even_during_a_long_computation(whole_run, tmp_path):
    run = WaitingRun(tmp_path / "run", hold=True)
    run.continue_step()
    run.send(signal.SIGTERM)
    assert "A second signal ends it at once" in run.hear()
    # Python's own handlers wait for the computation, and one signal does not end the process.
    run.process.join(0.5)
    assert run.process.exitcode is None
    run.send(signal.SIGINT)
    run.process.join(5)
    assert run.process.exitcode == 130
    assert_resumes_to_the_same_numbers(run.folder, whole_run, "on policy")


@pytest.mark.slow
def test_a_second_signal_ends_the_process_if_the_first_could_not_be_announced():
    connection, theirs = context.Pipe()
    process = start(killable_runs.wait_without_a_terminal, theirs)
    for expected in ("waiting", "SIGTERM: the run stops"):
        assert connection.poll(60)
        assert connection.recv().startswith(expected)
        os.kill(process.pid, signal.SIGTERM)
    assert exit_code_of(process) == 143


def test_a_signal_is_announced_and_the_earlier_handlers_are_restored():
    before = [signal.getsignal(number) for number in STOPPING]
    heard = Queue()
    with stopping(heard.put) as request:
        assert (request.signal, request.exit_code) == (None, 0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard.get(timeout=10).startswith("SIGTERM: the run stops after this step")
        assert (request.signal, request.exit_code) == (signal.SIGTERM, 143)
    assert [signal.getsignal(number) for number in STOPPING] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping(pytest.fail) as request:
            os.kill(os.getpid(), signal.SIGINT)
        assert request.signal is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_signals_go_to_their_own_handlers():
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        with stopping(pytest.fail) as request:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert (heard, request.signal) == ([signal.SIGUSR1], None)
    finally:
        signal.signal(signal.SIGUSR1, before)
