"""A step that hangs is reported with what it waits for, and ends the run if that is asked for."""

import json
import subprocess
import sys
import time

import pytest

import textpolicy as tp
from textpolicy import activity
from textpolicy.activity import doing
from textpolicy.cli import main
from textpolicy.errors import RunInterruptedError
from textpolicy.experiment.events import Reporter, RunEvent
from textpolicy.experiment.watchdog import Watchdog
from textpolicy.runs import RunDirectory

# Waits as long as a file says, in call 15: a trial, four held-out tasks, and two steps of four.
REWARD = """
import time
from pathlib import Path

calls = []
WAIT = Path(__file__).with_name("wait")

def digits(completion):
    calls.append(completion)
    if len(calls) == 15 and WAIT.exists():
        time.sleep(float(WAIT.read_text()))
    return sum(map(str.isdigit, completion)) / 10
"""
SMALL = ["--groups-per-step", "2", "--group-size", "2", "--count", "4", "--steps", "4"]


@pytest.fixture
def train(tmp_path):
    """Return a function that trains with a reward that waits in step 3 if a file asks for it."""
    (tmp_path / "mine.py").write_text(REWARD)

    def run(*argv: str, wait: float | None = None) -> subprocess.CompletedProcess[str]:
        (tmp_path / "wait").unlink(missing_ok=True)
        if wait is not None:
            (tmp_path / "wait").write_text(str(wait))
        return subprocess.run(
            [sys.executable, "-m", "textpolicy", "train", *argv],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return run


@pytest.fixture
def options(tmp_path):
    """Return a function from the name of a run to the options that start it."""

    def of(name: str) -> list[str]:
        task = ["--env", "add", "--reward", str(tmp_path / "mine.py")]
        return [*task, *SMALL, "--output", str(tmp_path / name)]

    return of


def alarms(tmp_path, name: str = "run") -> list[float]:
    rows = RunDirectory(tmp_path / name).metrics.read_text().splitlines()
    return [row["alarm/stalled"] for row in map(json.loads, rows) if "alarm/stalled" in row]


@pytest.mark.slow
def test_a_reward_that_hangs_is_reported_and_ends_the_run_with_75_and_its_last_checkpoint(
    train, options, tmp_path
):
    started = time.monotonic()
    ended = train(*options("run"), "--step-deadline", "1.5", "--stop-on-stall", wait=600)
    assert ended.returncode == 75 and time.monotonic() - started < 60
    assert "alarm: stalled: step 3 has taken" in ended.stderr
    assert "reward digits (" in ended.stderr and " of 4)" in ended.stderr
    assert "The last checkpoint is of step 2" in ended.stderr
    line = f"textpolicy train --resume {tmp_path / 'run'}"
    assert f"Resume the run with: {line}" in ended.stderr
    # Resumed with the line, the run reaches the numbers of one that never hung.
    assert train(*line.split()[2:]).returncode == 0
    assert train(*options("whole")).returncode == 0
    latest = [RunDirectory(tmp_path / name).latest.read_bytes() for name in ("run", "whole")]
    assert latest[0] == latest[1]


@pytest.mark.slow
def test_a_slow_step_that_ends_stops_the_run_with_75_and_a_checkpoint_of_that_step(
    train, options, tmp_path
):
    ended = train(*options("run"), "--step-deadline", "3", "--stop-on-stall", wait=4)
    assert ended.returncode == 75
    assert "The run stops after this step" in ended.stderr
    assert "The last checkpoint is of step 3" in ended.stderr
    assert alarms(tmp_path) == [0, 0, 1]
    assert train("--resume", str(tmp_path / "run")).returncode == 0
    assert alarms(tmp_path) == [0, 0, 1, 0]


@pytest.mark.slow
def test_without_stop_on_stall_a_slow_step_is_an_alarm_and_the_run_goes_on(
    train, options, tmp_path
):
    ended = train(*options("run"), "--step-deadline", "1", "--json", wait=3)
    assert ended.returncode == 0
    (alarm,) = json.loads(ended.stdout)["alarms"]
    assert alarm.startswith("step 3 has taken") and "more than --step-deadline 1" in alarm
    assert alarms(tmp_path) == [0, 0, 1, 0]
    assert "alarm: stalled" in ended.stderr


@pytest.fixture
def watched():
    """Return a watchdog that reports after half a second, and the events that it reported."""
    events: list[RunEvent] = []
    report = Reporter(events.append)
    dog = Watchdog(report, deadline=0.5, stop=False, resume_text=lambda: "")
    with dog:
        yield dog, events


def wait_for(events: list[RunEvent]) -> RunEvent:
    until = time.monotonic() + 10
    while not events and time.monotonic() < until:
        time.sleep(0.01)
    return events[0]


def test_a_stall_is_reported_once_with_what_the_process_does(watched):
    dog, events = watched
    dog.step_begins()
    with doing("sampling", 8) as sampling, doing("a step of an environment"):
        sampling.at(3)
        text = wait_for(events).text
        time.sleep(0.6)
    assert "sampling (3 of 8), a step of an environment" in text
    assert len(events) == 1 and dog.step_ended()
    assert not dog.step_ended()


def test_a_measurement_is_reported_only_if_nothing_in_it_moves(watched):
    _, events = watched
    with doing("measuring on held-out tasks", 40) as measuring:
        for _ in range(20):
            measuring.advance()
            time.sleep(0.05)
        assert not events
        assert "measuring on held-out tasks (20 of 40)" in wait_for(events).text


def test_without_a_deadline_ten_times_the_median_counts_once_there_are_five_steps():
    dog = Watchdog(Reporter(None), deadline=None, stop=False, resume_text=lambda: "")
    limits = []
    for seconds in (4.0, 5.0, 90.0, 5.0, 4.0, 5.0):
        limits.append(dog.limit)
        dog.record_step(seconds)
    assert limits == [None] * 5 + [50.0]
    quick = Watchdog(Reporter(None), deadline=None, stop=False, resume_text=lambda: "")
    for _ in range(5):
        quick.record_step(0.01)
    assert quick.limit == 10.0


def test_steps_that_share_one_generation_may_take_longer():
    dog = Watchdog(
        Reporter(None), deadline=None, stop=False, resume_text=lambda: "", steps_per_generation=4
    )
    for _ in range(5):
        dog.record_step(5.0)
    assert dog.limit == 200.0


def test_the_register_shows_what_every_thread_does():
    from threading import Event, Thread

    inside, leave = Event(), Event()

    def score() -> None:
        with doing("reward close", 4) as scoring:
            scoring.advance(2)
            inside.set()
            leave.wait(10)

    before = activity.described()
    with doing("sampling", 4):
        thread = Thread(target=score)
        thread.start()
        inside.wait(10)
        assert activity.described() == "sampling (0 of 4), reward close (2 of 4)"
        leave.set()
        thread.join()
    assert activity.described() == before


# The listener waits when it hears of update 3.
SUPERVISED = """
import json, sys, time
import textpolicy as tp

def wait(event):
    if event.kind == "step" and event.step == 3:
        time.sleep(float(sys.argv[2]))

tp.run(json.loads(sys.argv[1]), output=sys.argv[3], on_event=wait)
"""


@pytest.fixture
def supervised(tmp_path):
    """Return the config of a small supervised run with a deadline of a second for each step."""
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(10, 30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "data": {"source": str(tmp_path / "rows.jsonl")},
        "trainer": {"iterations": 6, "batch_size": 2},
        "run": {
            **{"steps_per_report": 1, "eval_every": 2, "checkpoint_every": 2},
            **{"step_deadline": 1.5, "stop_on_stall": True},
        },
    }


def stalled_rows(directory):
    rows = map(json.loads, directory.metrics.read_text().splitlines())
    return [int(row["step"]) for row in rows if row.get("alarm/stalled")]


@pytest.mark.slow
def test_supervised_training_that_stalls_stops_with_75_and_a_checkpoint_and_resumes(
    supervised, tmp_path
):
    heard = []

    def wait(event):
        heard.append(event.text)
        if event.kind == "step" and event.step == 3:
            time.sleep(2)

    with pytest.raises(RunInterruptedError, match=r"The last checkpoint is of step 3\. Resume"):
        tp.run(supervised, output=tmp_path / "run", on_event=wait)
    (alarm,) = [text for text in heard if text.startswith("alarm")]
    assert "nothing has moved for" in alarm and "after step 3" in alarm
    assert "more than --step-deadline 1.5. Now: reporting" in alarm
    resumed = tp.run(resume=tmp_path / "run")
    whole = tp.run(supervised, output=tmp_path / "whole")
    assert resumed.after and whole.after and resumed.after.value == whole.after.value
    assert resumed.directory.latest.read_bytes() == whole.directory.latest.read_bytes()
    assert not whole.alarms


@pytest.mark.slow
def test_supervised_training_that_hangs_ends_as_by_a_kill_with_75_and_its_last_checkpoint(
    supervised, tmp_path
):
    hanging = [sys.executable, "-c", SUPERVISED, json.dumps(supervised), "600"]
    started = time.monotonic()
    ended = subprocess.run([*hanging, str(tmp_path / "run")], check=False, timeout=120)
    assert ended.returncode == 75 and time.monotonic() - started < 60
    assert main(["sft", "--resume", str(tmp_path / "run")]) == 0
    assert main(["sft", "--resume", str(tmp_path / "run"), "--stop-on-stall"]) == 0


@pytest.mark.slow
def test_without_stop_on_stall_supervised_training_reports_a_stall_and_goes_on(
    supervised, tmp_path
):
    supervised["run"]["stop_on_stall"] = False
    result = tp.run(
        supervised,
        output=tmp_path / "run",
        on_event=lambda event: time.sleep(2) if event.text.startswith("iteration 3: tr") else None,
    )
    assert result.ended == "finished" and result.steps == 6
    (alarm,) = result.alarms
    assert alarm.startswith("nothing has moved for") and "after step 3" in alarm
    assert stalled_rows(result.directory) == [4]
