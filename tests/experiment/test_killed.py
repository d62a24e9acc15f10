"""A run that is killed at any instant, and gone on with, comes to the numbers of a straight one."""

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

from tests import victim
from tests.test_resume import MODES
from tests.victim import STEPS, context, end_of, start
from textpolicy.cli.signals import STOPPING, stopping
from textpolicy.runs import RunDirectory
from textpolicy.tracking.jsonl import read_metrics
from textpolicy.training.checkpoint import Checkpoints

CLOCKS = ("time/", "memory/", "tokens_per_second")
KILLS = 20


def outcome(folder):
    """The hash of the last adapter, and every row of metrics that no clock has a part in."""
    run = RunDirectory(folder)
    rows = [
        {name: value for name, value in row.items() if not name.startswith(CLOCKS)}
        for row in read_metrics(run.metrics)
    ]
    return hashlib.sha256(run.latest.read_bytes()).hexdigest(), rows


def hidden(folder):
    return sorted(path.name for path in folder.rglob(".*"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The outcome of a run in a mode that nothing ever happened to, and its seconds."""
    known = {}

    def find(mode):
        if mode not in known:
            folder = tmp_path_factory.mktemp("straight")
            process, began = loaded(folder, mode), time.monotonic()
            assert end_of(process) == 0
            known[mode] = outcome(folder), time.monotonic() - began
        return known[mode]

    return find


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of several steps a generation, stopped in the middle of one."""
    folder = tmp_path_factory.mktemp("begun")
    options = MODES["several steps a generation"]
    assert end_of(start(victim.train_until_step, folder, options, STEPS - 1)) == 0
    return folder


@pytest.fixture
def copied(begun, tmp_path):
    """A function that makes one more copy of the run that has begun."""
    numbers = count()
    return lambda: shutil.copytree(begun, tmp_path / str(next(numbers)))


def goes_on_to_the_same_numbers(folder, straight, mode="several steps a generation"):
    assert end_of(start(victim.train, folder, MODES[mode])) == 0
    assert outcome(folder) == straight(mode)[0]
    assert [row["step"] for row in outcome(folder)[1]] == list(range(STEPS))
    assert hidden(folder) == [".lock"]


def loaded(folder, mode):
    """A process that has a model, and has not looked at the folder yet."""
    hear, say = context.Pipe(duplex=False)
    process = start(victim.train_aloud, folder, MODES[mode], say)
    assert hear.poll(60)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_is_killed_at_random_times_comes_to_the_same_numbers(straight, tmp_path, mode):
    random = Random(mode)
    expected, seconds = straight(mode)
    kills, folders = 0, count()
    folder = tmp_path / str(next(folders))
    while kills < KILLS / len(MODES):
        process = loaded(folder, mode)
        process.join(random.uniform(0, 0.7 * seconds))
        if process.exitcode is None:
            process.kill()
            kills += end_of(process) == -signal.SIGKILL
        else:
            assert process.exitcode == 0
            assert outcome(folder) == expected
            folder = tmp_path / str(next(folders))
    goes_on_to_the_same_numbers(folder, straight, mode)


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_run_that_is_killed_at_any_call_of_a_save_goes_on_from_it(straight, copied, after):
    # Files are written only between an unlink and the next call: after any other call all is as it
    # is before the next.
    calls = ("unlink",) if after else ("fsync", "replace", "unlink", "truncate")
    options = MODES["several steps a generation"]
    for number in count(1):
        folder = copied()
        code = end_of(start(victim.train_until_call, folder, options, calls, number, after))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        goes_on_to_the_same_numbers(folder, straight)
    # Going on publishes, and a step publishes and saves: each flushes, renames, flushes again and
    # looks for what it may have left.
    assert number > (3 if after else 3 * 4)


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_byte_of_a_file_goes_on_from_the_one_before(straight, copied):
    run = RunDirectory(copied())
    adapter = run.latest.stat().st_size
    saved = max(path.stat().st_size for path in run.checkpoints.iterdir())
    within = [Random(0).randrange(adapter, saved) for _ in range(2)]
    for size in [0, 9, 500, adapter // 2, adapter - 1, adapter, *within, saved // 3]:
        folder = copied()
        before = {path: path.read_bytes() for path in RunDirectory(folder).checkpoints.iterdir()}
        code = end_of(
            start(victim.train_until_byte, folder, MODES["several steps a generation"], size)
        )
        assert code == -signal.SIGXFSZ
        assert all(path.read_bytes() == content for path, content in before.items())
        goes_on_to_the_same_numbers(folder, straight)


@pytest.mark.slow
def test_a_full_disk_is_an_error_that_says_so_and_harms_nothing(straight, copied):
    run = RunDirectory(copied())
    adapter = run.latest.stat().st_size
    full = {adapter // 2: f"UnwritableError: {{}}/adapters/{run.latest.name} cannot be written"}
    full[2 * adapter] = f"TrainingError: no checkpoint was saved after step {STEPS}"
    for size, expected in full.items():
        folder = copied()
        before = contents(folder)
        hear, say = context.Pipe(duplex=False)
        options = MODES["several steps a generation"]
        assert end_of(start(victim.train_on_a_full_disk, folder, options, size, say)) == 0
        error = hear.recv()
        assert error.startswith(expected.format(folder))
        assert os.strerror(errno.EFBIG) in error
        assert "on a disk with room" in error
        assert contents(folder).items() >= before.items()
        assert hidden(folder) == [".lock"]
        goes_on_to_the_same_numbers(folder, straight)


def contents(folder):
    """What is in every checkpoint."""
    return {path.name: path.read_bytes() for path in RunDirectory(folder).checkpoints.iterdir()}


# Signals


class Stoppable:
    """A run in a process of its own, held in its third step until it is told to go on."""

    def __init__(self, folder, *, hold=False):
        self.folder = folder
        self.said, theirs = context.Pipe()
        self.process = start(victim.train_stoppably, folder, MODES["on policy"], hold, theirs)
        theirs.close()
        assert [self.hear() for _ in range(3)] == [1, 2, "in the third step"]

    def hear(self):
        assert self.said.poll(60), "nothing was said for 60 s"
        return self.said.recv()

    def send(self, number):
        os.kill(self.process.pid, number)
        return self

    def go_on(self):
        self.said.send(None)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_first_signal_ends_the_run_after_the_step_in_flight(straight, tmp_path, number, code):
    run = Stoppable(tmp_path / "my run").send(number)
    assert run.hear() == (
        f"{number.name}: the run stops after this step and saves a checkpoint. "
        "A second signal ends it at once"
    )
    run.go_on()
    assert run.hear() == 3
    assert end_of(run.process) == code
    assert Checkpoints(RunDirectory(run.folder).checkpoints).newest().step == 3
    goes_on_to_the_same_numbers(run.folder, straight, "on policy")


@pytest.mark.slow
def test_a_second_signal_leaves_at_once_even_out_of_a_long_computation(straight, tmp_path):
    run = Stoppable(tmp_path / "run", hold=True)
    run.go_on()
    run.send(signal.SIGTERM)
    assert "A second signal ends it at once" in run.hear()
    # Python's own handlers wait for the computation; one signal ends nothing.
    run.process.join(0.5)
    assert run.process.exitcode is None
    run.send(signal.SIGINT)
    run.process.join(5)
    assert run.process.exitcode == 130
    goes_on_to_the_same_numbers(run.folder, straight, "on policy")


@pytest.mark.slow
def test_a_second_signal_leaves_where_the_first_could_not_be_announced():
    said, theirs = context.Pipe()
    process = start(victim.wait_without_a_terminal, theirs)
    for expected in ("waiting", "SIGTERM: the run stops"):
        assert said.poll(60)
        assert said.recv().startswith(expected)
        os.kill(process.pid, signal.SIGTERM)
    assert end_of(process) == 143


def test_a_signal_is_noted_and_announced_and_the_handlers_of_before_come_back():
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
