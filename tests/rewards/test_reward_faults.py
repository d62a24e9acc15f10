"""Rewards that raise, hang, crash or return nonsense, under each policy for errors."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest

from tests.rewards.scoring_calls import samples
from tests.timing import least_seconds
from textpolicy.errors import ConfigError, RewardError
from textpolicy.rewards import Rewards, Scorer, load_reward, sample_of

TIMEOUT = 0.2
ALLOWED = TIMEOUT + 0.5
SOURCE = """
import asyncio, ctypes, os, re, subprocess, sys, time
import textpolicy as tp

def act(what):
    if what == "raises":
        raise ValueError("no such answer")
    if what == "hangs":
        time.sleep(60)
    if what == "spins in Python":
        while True:
            pass
    if what == "spins in C":
        re.fullmatch("(a+)+", "a" * 60 + "b")
    if what == "exits the process":
        os._exit(3)
    if what == "segfaults":
        ctypes.string_at(0)
    if what == "returns NaN":
        return float("nan")
    if what == "returns None":
        return None
    if what == "returns a string":
        return "good"
    if what == "returns a megabyte":
        return "x" * 1_000_000
    if what == "prints a megabyte":
        print("x" * 1_000_000)
        print("x" * 1_000_000, file=sys.stderr)
    return 1.0

def odd(completion):
    return act(completion)

@tp.reward(batched=True)
def counting(completions):
    return [1.0] * (len(completions) + ("returns the wrong count" in completions))

@tp.reward(batched=True)
def odd_batch(completions):
    return [act(completion) for completion in completions]

async def odd_await(completion):
    if completion == "hangs":
        await asyncio.sleep(60)
    return act(completion)

def imports(completion):
    return float(bool({"mlx", "mlx.core", "numpy"} & set(sys.modules)))

def starts_a_process(completion):
    sleep = [sys.executable, "-c", "import time; time.sleep(60)", completion]
    subprocess.Popen(sleep)
    if sys.platform == "linux":
        subprocess.Popen(sleep, start_new_session=True)
    time.sleep(60)

def greedy(completion):
    return float(len(bytearray(2 << 30)) if completion == "much" else 1)

def process_id(completion):
    return os.getpid()
"""
HARMLESS = {"returns None": None, "prints a megabyte": 1.0}
FAULTS = {
    "raises": r"odd raised ValueError: no such answer \(.*faulty\.py, line 7\)",
    "hangs": "odd took longer than 0.2 s and was stopped",
    "spins in Python": "odd took longer than 0.2 s and was stopped",
    "spins in C": "odd took longer than 0.2 s and was stopped",
    "exits the process": "odd ended its process, which exited with code 3",
    "segfaults": r"(?s)odd ended its process, which died of SIGSEGV.*faulty\.py.*line 18",
    "returns NaN": "odd returned nan",
    "returns a string": "odd returned 'good'",
    "returns a megabyte": "odd returned 'xxx",
    "returns the wrong count": r"counting returned 4 values \(list\) for 3 samples",
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """A function that loads a reward of the faulty file by its name."""
    path = tmp_path_factory.mktemp("rewards") / "faulty.py"
    path.write_text(SOURCE)
    rewards = {}

    def load(name):
        if name not in rewards:
            rewards[name] = load_reward(f"{path}:{name}")
        return rewards[name]

    return load


@pytest.fixture(scope="module")
def scorers(faulty):
    """One scorer with running processes for each policy; it has to survive all faults."""
    functions = [faulty("odd"), faulty("counting")]
    opened = {
        policy: Scorer(Rewards(functions, timeout=TIMEOUT, on_error=policy, workers=2))
        for policy in ("fail", "skip", -1.0)
    }
    for scorer in opened.values():
        scorer.score(samples("fine"))
    yield opened
    for scorer in opened.values():
        scorer.close()


def timed(scorer, *completions):
    """The verdicts, and the seconds that the scoring took."""
    verdicts = []

    def score():
        verdicts[:] = scorer.score(samples(*completions))

    seconds = least_seconds(score, below=ALLOWED)
    return verdicts, seconds


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("policy", ["skip", pytest.param(-1.0, marks=pytest.mark.slow)])
def test_a_fault_costs_its_sample_and_no_more_than_the_timeout(scorers, fault, policy):
    scorer = scorers[policy]
    scorer.restore([])  # thirty faults in a row are what the error rate stops
    verdicts, seconds = timed(scorer, "before", fault, "after")
    assert seconds < ALLOWED
    whole_batch = fault == "returns the wrong count"
    lost = 0.0 if policy == -1.0 else None
    expected = [lost] * 3 if whole_batch else [2.0, lost, 2.0]
    assert [verdict.value for verdict in verdicts] == expected
    message = verdicts[1].error
    assert re.search(FAULTS[fault], message)
    assert f"completion '{'before' if whole_batch else fault}'" in message
    assert whole_batch or verdicts[0].error is verdicts[2].error is None


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_the_run_in_time_if_on_error_is_fail(scorers, fault):
    def score():
        with pytest.raises(RewardError, match=FAULTS[fault]):
            scorers["fail"].score(samples("before", fault, "after"))

    assert least_seconds(score, below=ALLOWED) < ALLOWED


@pytest.mark.parametrize("what", HARMLESS)
@pytest.mark.parametrize("policy", ["fail", "skip", -1.0])
def test_none_and_much_output_are_no_faults(scorers, what, policy):
    verdicts, seconds = timed(scorers[policy], "before", what, "after")
    assert seconds < ALLOWED
    middle = verdicts[1]
    assert middle.error is None
    assert middle.parts == {"counting": 1.0} | ({"odd": 1.0} if HARMLESS[what] else {})


def test_the_step_after_a_fault_is_scored_as_usual(scorers):
    with pytest.raises(RewardError):
        scorers["fail"].score(samples("segfaults"))
    scorers["skip"].score(samples("hangs", "segfaults"))
    for policy in ("fail", "skip"):
        verdicts, seconds = timed(scorers[policy], "a", "b")
        assert [verdict.value for verdict in verdicts] == [2.0, 2.0]
        assert seconds < ALLOWED


@pytest.mark.slow
@pytest.mark.parametrize("name", ["odd_batch", "odd_await"])
def test_batched_and_awaited_rewards_are_stopped_too(faulty, name):
    rewards = Rewards(faulty(name), timeout=TIMEOUT, on_error="skip", workers=1)
    with closing(Scorer(rewards)) as scorer:
        scorer.score(samples("fine"))
        hung, seconds = timed(scorer, "fine", "hangs")
        assert seconds < ALLOWED
        # A batch is lost as a whole; awaited calls are lost one by one.
        assert [v.value for v in hung] == [1.0 if name == "odd_await" else None, None]
        assert "took longer than 0.2 s" in hung[1].error
        stuck, seconds = timed(scorer, "fine", "spins in C")
        assert seconds < ALLOWED + 0.2  # the only process may still have been starting
        assert stuck[1].value is None and "took longer than 0.2 s" in stuck[1].error


def test_a_worker_process_imports_neither_mlx_nor_numpy(faulty):
    with closing(Scorer(Rewards(faulty("imports"), timeout=5))) as scorer:
        assert scorer.score(samples("x"))[0].value == 0.0


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not limit address space")
def test_a_reward_beyond_its_memory_limit_gets_a_memory_error(faulty):
    rewards = Rewards(faulty("greedy"), timeout=20, memory_gb=1, on_error="skip", workers=1)
    with closing(Scorer(rewards)) as scorer:
        much, little = scorer.score(samples("much", "little"))
    assert "reward greedy raised MemoryError" in much.error
    assert (much.value, little.value) == (None, 1.0)


@pytest.mark.slow
def test_a_process_that_a_killed_reward_started_is_killed_too(faulty):
    mark = f"orphan-{os.getpid()}"
    rewards = Rewards(faulty("starts_a_process"), timeout=TIMEOUT, on_error="skip")
    with closing(Scorer(rewards)) as scorer:
        assert scorer.score(samples(mark))[0].value is None
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert mark not in running


FORGERS = """
import json, os, socket
def forger(completion):
    if completion.startswith("{"):
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            try:
                if os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket"):
                    os.write(descriptor, completion.encode() + b"\\n")
            except OSError:
                pass
    return 1.0
"""
RESULT = {"value": 9.0, "metrics": {}, "seconds": 0.0, "error": None, "note": ""}
FORGED_ANSWERS = {
    "a place that is not there": {"place": 99, "result": RESULT},
    "a negative place": {"place": -1, "result": RESULT},
    "a place that is text": {"place": "0", "result": RESULT},
    "no result": {"place": 0, "result": {}},
    "an unknown field": {"place": 0, "result": RESULT | {"more": 1}},
    "a value that is text": {"place": 0, "result": RESULT | {"value": "9"}},
    "a value that is not finite": {"place": 0, "result": RESULT | {"value": float("inf")}},
    "a value that is too large": {"place": 0, "result": RESULT | {"value": 10**400}},
    "metrics that are no numbers": {"place": 0, "result": RESULT | {"metrics": {"a": [1]}}},
    "metrics that are a list": {"place": 0, "result": RESULT | {"metrics": [1]}},
    "seconds that are text": {"place": 0, "result": RESULT | {"seconds": "1"}},
    "an error that is a number": {"place": 0, "result": RESULT | {"error": 1}},
    "the end of the call": {"done": True},
    "that it is ready": {"ready": True},
    "a failure without a text": {"failed": 1},
    "nothing": {},
}


@pytest.mark.skipif(sys.platform != "linux", reason="the reward finds its socket through /proc")
@pytest.mark.slow
@pytest.mark.proves("F7")
def test_an_answer_that_a_reward_forges_is_a_fault_of_its_sample_alone(tmp_path, attempts):
    (tmp_path / "forgers.py").write_text(FORGERS)
    reward = load_reward(f"{tmp_path}/forgers.py:forger")
    with closing(Scorer(Rewards(reward, timeout=20, on_error="skip", workers=1))) as scorer:
        for name, answer in FORGED_ANSWERS.items():
            scorer.restore([])
            before, forged, after = scorer.score(samples("a", json.dumps(answer), "b"))
            assert (before.value, forged.value, after.value) == (1.0, None, 1.0), name
            assert "where an answer was expected" in forged.error, name
            attempts.add()


def process_of(scorer):
    """The process in which the reward `process_id` runs."""
    (verdict,) = scorer.score(samples("x"))
    return int(verdict.value)


def test_a_process_stays_open_and_is_gone_when_the_scorer_is_closed(faulty):
    scorer = Scorer(Rewards(faulty("process_id"), timeout=5, workers=1))
    pid = process_of(scorer)
    assert process_of(scorer) == pid != os.getpid()
    scorer.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_process_killed_from_outside_is_replaced_and_no_sample_is_blamed(faulty):
    with closing(Scorer(Rewards(faulty("process_id"), timeout=5, workers=1))) as scorer:
        pid = process_of(scorer)
        os.kill(pid, signal.SIGKILL)
        while _alive(pid):
            time.sleep(0.01)
        assert process_of(scorer) != pid


@pytest.mark.parametrize("on_error", ["skip", 0.0])
def test_too_many_faults_end_the_run_with_the_last_of_them(on_error):
    def often(completion):
        if completion == "bad":
            raise ValueError("again")
        return 1.0

    with closing(Scorer(Rewards(often, on_error=on_error, max_error_rate=0.1))) as scorer:
        for _ in range(5):
            scorer.score(samples("bad", "bad", *["good"] * 18))
        # Ten of a hundred calls may fail, and older calls are forgotten.
        scorer.score(samples(*["good"] * 20, *["bad"] * 2))
        with pytest.raises(RewardError, match=r"(?s)11 of the last 100 .* more than 10%.*again"):
            scorer.score(samples("bad", "bad", "bad"))


def test_each_sample_of_a_failed_batch_counts_as_a_failed_call():
    from textpolicy.rewards import reward

    @reward(batched=True)
    def offline(completions):
        raise OSError("no route")

    with closing(Scorer(Rewards(offline, on_error="skip"))) as scorer:
        scorer.score(samples(*["x"] * 16))
        with pytest.raises(RewardError, match="21 of the last 21 calls"):
            scorer.score(samples(*["x"] * 16))


def test_each_sample_of_a_batch_that_another_process_loses_counts_as_a_failed_call(faulty):
    rewards = Rewards(faulty("odd_batch"), timeout=20, on_error="skip", workers=1)
    with closing(Scorer(rewards)) as scorer:
        # One batch may fail by chance.
        scorer.score(samples(*["exits the process"] * 24))
        with pytest.raises(RewardError, match="25 of the last 25 calls"):
            scorer.score(samples(*["exits the process"] * 24))


def test_failing_and_slow_samples_are_reported_once_a_call_with_function_and_seconds():
    def uneven(completion):
        time.sleep(0.25 if completion == "slow" else 0.0)
        return 1 / len(completion)

    incidents = []
    rewards = Rewards(uneven, on_error="skip", slow=0.2)
    with closing(Scorer(rewards, on_incident=incidents.append)) as scorer:
        scorer.score(samples("fine", "slow", "slow", "", ""))
        scorer.score(samples("fine"))
    failed, slow = incidents
    assert failed.error.startswith("reward uneven raised ZeroDivisionError") and failed.more == 1
    assert (slow.reward, slow.error, slow.more) == ("uneven", None, 1)
    assert 0.25 <= slow.seconds < 5 and "completion 'slow'" in slow.sample
    assert re.match(r"reward uneven took [0-9.]+ s \(and 1 more\)", str(slow))


def test_a_function_that_no_other_process_could_find_is_refused_a_timeout():
    def local(completion):
        return 1.0

    for function in (local, lambda completion: 1.0):
        with pytest.raises(ConfigError, match="top level of a file"):
            Scorer(Rewards(function, timeout=1))


def test_rows_that_cannot_be_sent_to_another_process_are_an_error_that_says_so(faulty):
    unsendable = [sample_of("p", "c", {"answer": lambda: 1})]
    with (
        closing(Scorer(Rewards(faulty("process_id"), timeout=5))) as scorer,
        pytest.raises(RewardError, match="handing rows to another process raised"),
    ):
        scorer.score(unsendable)


def test_a_file_that_only_fails_to_import_in_another_process_is_an_error(tmp_path):
    path = tmp_path / "once.py"
    path.write_text("def score(completion):\n    return 1.0\n")
    reward = load_reward(str(path))
    for source, message in [
        ("import nowhere_to_be_found", "raised ModuleNotFoundError"),
        ("import os; os._exit(4)", "was not ready when it exited with code 4"),
        ("", "finding the reward functions in a new process raised"),
    ]:
        path.write_text(source)
        with (
            closing(Scorer(Rewards(reward, timeout=5))) as scorer,
            pytest.raises(RewardError, match=message),
        ):
            scorer.score(samples("x"))


SCRIPT = """
import textpolicy as tp
from textpolicy.rewards import Scorer, sample_of

def score(completion):
    return float(len(completion))

@tp.reward(batched=True)
def lengths(completions):
    return [len(text) for text in completions]

def main():
    scorer = Scorer(tp.Rewards([score, lengths], timeout=5))
    print([v.value for v in scorer.score([sample_of("p", "abc", {})])])
"""


@pytest.mark.parametrize(
    ("last_line", "printed"),
    [
        ("if __name__ == '__main__': main()", "[6.0]"),
        ("main()", 'put the code that starts the run under `if __name__ == "__main__":`'),
    ],
)
def test_a_script_may_hold_its_rewards_if_its_main_part_is_guarded(tmp_path, last_line, printed):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT + last_line + "\n")
    done = subprocess.run(
        [sys.executable, "-W", "error", path], capture_output=True, text=True, timeout=60
    )
    assert printed in done.stdout + done.stderr


@pytest.mark.slow
def test_a_worker_stuck_in_c_code_ends_soon_after_its_deadline_if_its_parent_was_killed(tmp_path):
    (tmp_path / "faulty.py").write_text(SOURCE)
    program = (
        "import os\n"
        "from textpolicy.rewards import *\n"
        "functions = [load_reward(f'faulty.py:{name}') for name in ('odd', 'process_id')]\n"
        "scorer = Scorer(Rewards(functions, timeout=1, workers=1))\n"
        "(verdict,) = scorer.score([sample_of('p', 'fine', {})])\n"
        "print(int(verdict.parts['process_id']), flush=True)\n"
        "scorer.score([sample_of('p', 'spins in C', {})])\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    pid = int(parent.stdout.readline())
    time.sleep(0.3)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 5
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)


ENDLESS = """
import os, subprocess, sys, time
def score(completion):
    return 1.0
def waits(completion):
    time.sleep(60)
def starts(completion):
    own_session = sys.platform == "linux"
    subprocess.run(["sleep", "60"], start_new_session=own_session)
if os.getsid(0) == os.getpid() and {slow_import}:
    time.sleep(60)
"""


def _started_with(mark: str) -> set[int]:
    """The ids of the processes that have this text in their environment."""
    shown = subprocess.run(["ps", "eww", "-Ao", "pid=,stat=,command="], capture_output=True)
    lines = [line.split(maxsplit=2) for line in shown.stdout.decode(errors="replace").splitlines()]
    return {int(pid) for pid, state, rest in lines if mark in rest and state[0] != "Z"}


def _still_running_after(mark: str, seconds: float) -> set[int]:
    """The ids of these processes that still run after some seconds."""
    deadline = time.monotonic() + seconds
    while (left := _started_with(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


@pytest.mark.slow
@pytest.mark.proves("S5")
@pytest.mark.parametrize("what", ["score", "waits", "starts", "imports"])
def test_no_process_of_a_reward_outlives_a_killed_run_whatever_the_reward_was_doing(
    tmp_path, what, attempts
):
    (tmp_path / "endless.py").write_text(ENDLESS.format(slow_import=what == "imports"))
    name = "score" if what == "imports" else what
    program = (
        "from textpolicy.rewards import *\n"
        f"rewards = Rewards(load_reward('endless.py:{name}'), timeout=50, workers=2)\n"
        "while True: Scorer(rewards).score([sample_of('p', 'x', {}) for _ in range(4)])\n"
    )
    mark = f"RUN_TO_BE_KILLED={tmp_path}"
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"RUN_TO_BE_KILLED": str(tmp_path)},
    )
    # The run, two guards and two workers, and the process that each worker may have started.
    wanted = 7 if what == "starts" else 5
    deadline = time.monotonic() + 30
    try:
        while (most := len(_started_with(mark))) < wanted and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.5)
    finally:
        parent.kill()
        parent.wait()
    assert most >= 3
    assert not _still_running_after(mark, 5)
    attempts.add()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["workers start", "between steps"])
def test_no_process_outlives_a_training_run_that_is_killed(tmp_path, moment):
    (tmp_path / "endless.py").write_text(ENDLESS.format(slow_import=False))
    command = [sys.executable, "-c", "from textpolicy.cli import main; raise SystemExit(main())"]
    command += ["train", "--env", "add", "--reward", "endless.py:score", "--reward-timeout", "20"]
    command += ["--count", "4", "--groups-per-step", "2", "--group-size", "2", "--output", "run"]
    mark, metrics = f"RUN_TO_BE_KILLED={tmp_path}", tmp_path / "run" / "metrics.jsonl"
    run = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"RUN_TO_BE_KILLED": str(tmp_path)},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        steps = metrics.read_text().count("\n") if metrics.exists() else 0
        if (len(_started_with(mark)) > 1) if moment == "workers start" else (steps > 1):
            break
        time.sleep(0.02)
    assert run.poll() is None
    run.kill()
    run.wait()
    assert not _still_running_after(mark, 5)


def _alive(pid: int) -> bool:
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return done.stdout.strip()[:1] not in ("", "Z")
