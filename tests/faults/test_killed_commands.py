"""`textpolicy train` and `textpolicy sft`, killed again and again until a run ends by itself."""

import json
import os
import signal
import time
from itertools import count
from random import Random

import pytest

from tests.faults.killable_runs import (
    exit_code_of,
    fork_by_default,
    let_the_clock_jump,
    start_command,
)
from textpolicy.runs import RunDirectory
from textpolicy.tracking.jsonl import read_rows

TRAIN = [
    *("train", "--env", "add", "--steps", "5", "--groups-per-step", "4", "--group-size", "4"),
    *("--count", "16", "--rank", "4", "--lr", "0.01", "--schedule", "cosine"),
]
SFT = [
    *("sft", "--data", "{folder}/rows.jsonl", "--iterations", "12", "--batch-size", "2"),
    *("--checkpoint-every", "2", "--steps-per-report", "1", "--eval-every", "4", "--rank", "4"),
]
MODES = {
    "train": TRAIN,
    "train in micro-batches": [*TRAIN, "--micro-batch-size", "3"],
    "train, several updates a step": [*TRAIN, "--mini-batches", "2", "--epochs", "2"],
    "train, several steps a generation": [*TRAIN, "--steps-per-generation", "3"],
    "train, few checkpoints, many evaluations": [
        *(*TRAIN, "--checkpoint-every", "2", "--keep-checkpoints", "1", "--eval-every", "1"),
    ],
    "train, rewards in a process": [
        *(*TRAIN, "--reward", "{folder}/reward.py", "--reward-timeout", "60"),
    ],
    "sft": SFT,
    "sft, packed rows and dropout": [
        *(*SFT, "--packing", "--max-length", "32", "--accumulation", "2", "--dropout", "0.2"),
    ],
}
REWARD = """
def reward(completion, example):
    return float(completion.strip()[:1] == str(example["sum"])[:1])
"""
CLOCKS = ("time/", "memory/", "tokens_per_second", "iterations_per_second")


class Runs:
    """The runs of one mode: the first one is not killed, and the others must equal it."""

    def __init__(self, folder, options):
        self.folder = folder
        self.options = [option.format(folder=folder) for option in options]
        (folder / "reward.py").write_text(REWARD)
        pairs = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(20)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        self.numbers = count()
        self.log = folder / "printed.txt"
        self.new()
        process, began = self.start(), time.monotonic()
        assert exit_code_of(process) == 0, self.log.read_text()
        self.seconds = time.monotonic() - began
        self.expected = results_of(self.run)

    def new(self):
        """Let the next process start a run of its own."""
        self.run = RunDirectory(self.folder / str(next(self.numbers)))

    def start(self, instant=None, *, locked=True, prepare=None):
        """Start or resume the run, and return its process, at once or when it has the lock.

        The process calls `prepare` first, and gets a signal at the instant.
        """
        resume = [self.options[0], "--resume", str(self.run.path)]
        begin = [*self.options, "--output", str(self.run.path)]
        process, self.hear = start_command(
            resume if self.run.exists else begin, self.log, instant, prepare
        )
        if locked:
            assert self.hear.poll(300), "the run has not begun for five minutes"
        return process

    def finish(self):
        """Resume the run until it ends, and compare it with the one that was not killed."""
        assert exit_code_of(self.start()) == 0, self.log.read_text()
        self.check()

    def check(self):
        """Compare the run, which has ended by itself, with the one that was not killed."""
        assert results_of(self.run) == self.expected
        assert not list(self.run.path.rglob(".*.*")), "a partial file is left"


def results_of(run):
    """Return every adapter file, and the rows of metrics without times, and the samples."""
    metrics = [
        {name: value for name, value in row.items() if not name.startswith(CLOCKS)}
        for row in read_rows(run.metrics)
    ]
    adapters = {path.name: path.read_bytes() for path in run.adapters.iterdir()}
    return adapters, metrics, list(read_rows(run.samples))


def assert_nothing_is_left_of(process):
    """Wait until every process that the run has started is gone."""
    deadline = time.monotonic() + 300
    while True:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        assert time.monotonic() < deadline, "a process of the killed run is left after five minutes"
        time.sleep(0.01)


def kill_runs(runs, kills, attempts, seed):
    """Kill runs at `kills` instants that are spread evenly over a whole run, in any order."""
    random = Random(seed)
    parts = random.sample(range(kills), kills)
    is_new = False
    while parts:
        # Every fifth process is killed while it still loads.
        started = time.monotonic()
        process = runs.start(locked=len(parts) % 5 != 0)
        process.join(runs.seconds * (parts[-1] + random.random()) / kills)
        if process.exitcode is None:
            process.kill()
        if exit_code_of(process) == -signal.SIGKILL:
            attempts.add()
            parts.pop()
            is_new = False
        else:
            if is_new:
                # The machine is faster than it was when the length of a run was measured.
                runs.seconds = min(runs.seconds, time.monotonic() - started)
            is_new = True
            assert process.exitcode == 0, runs.log.read_text()
            runs.check()
            runs.new()
        assert_nothing_is_left_of(process)
    runs.finish()


# What the other modes add to these is in the long tests, and without processes in test_resume.py.
QUICK = {"train", "train, rewards in a process", "sft"}


@pytest.mark.proves("F1")
@pytest.mark.parametrize(
    ("kills", "seed", "mode"),
    [
        pytest.param(
            *(kills, seed, mode),
            marks=pytest.mark.slow if kills == 3 and mode in QUICK else pytest.mark.long,
            id=f"{mode}, {kills} kills",
        )
        for kills, seed in ((3, 0), (12, 1))
        for mode in MODES
    ],
)
def test_a_run_killed_at_any_instants_ends_with_the_same_files(
    tmp_path, attempts, mode, kills, seed
):
    kill_runs(Runs(tmp_path, MODES[mode]), kills, attempts, seed)


@pytest.mark.proves("F20")
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train, rewards in a process", "sft"])
@pytest.mark.parametrize(
    "prepare", [let_the_clock_jump, fork_by_default], ids=lambda prepare: prepare.__name__
)
def test_an_odd_process_ends_with_the_same_files(tmp_path, mode, prepare):
    runs = Runs(tmp_path, MODES[mode])
    runs.new()
    assert exit_code_of(runs.start(prepare=prepare)) == 0, runs.log.read_text()
    runs.check()
    for row in read_rows(runs.run.metrics):
        assert all(0 <= row[name] < 100 for name in row if name.startswith("time/"))
