"""Runs with rewards that change their process: the run stays where it is and as it was."""

import os
import subprocess
import sys

import pytest

from textpolicy.experiment import run
from textpolicy.user_code import keep_working_directory

RESTLESS = """
import atexit, os, random, signal, sys, threading, time, warnings

os.makedirs("elsewhere", exist_ok=True)
os.chdir("elsewhere")
left = []

def restless(completion, example):
    assert os.getcwd().endswith("elsewhere") or left
    os.makedirs("away", exist_ok=True)
    os.chdir("away")
    example.clear()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.alarm(1)
    sys.setrecursionlimit(150)
    warnings.simplefilter("error")
    sys.excepthook = print
    {more}
    return random.random()
"""
LEAVES = """
    sys.stdout.close()
    sys.stderr.close()
    if not left:
        left.append(threading.Thread(target=time.sleep, args=(600,), name="left"))
        left[0].start()
        atexit.register(time.sleep, 600)
"""
SECTIONS = {
    "rollout": {"group_size": 2, "groups_per_step": 2},
    "evaluation": {"count": 4},
    "sampling": {"max_tokens": 4},
}


def test_a_reward_that_changes_its_directory_does_not_move_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(keep_working_directory, "users", None)
    (tmp_path / "mine.py").write_text(RESTLESS.replace("{more}", "left.append(1)"))
    task = {"env": "add", "reward": "mine.py"}
    result = run({"task": task, "run": {"steps": 2}, **SECTIONS}, output="out")
    assert result.directory.path == tmp_path / "out" and result.steps == 2
    assert {"config.toml", "metrics.jsonl", "report.html", "samples.jsonl"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    found = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
    assert found == {"elsewhere", "mine.py", "out"}
    assert os.getcwd() == str(tmp_path)


@pytest.mark.slow
def test_a_reward_that_closes_the_streams_and_leaves_threads_does_not_keep_the_command(tmp_path):
    (tmp_path / "mine.py").write_text(RESTLESS.replace("{more}", LEAVES))
    command = [sys.executable, "-m", "textpolicy", "train", "--env", "add", "--reward", "mine.py"]
    small = ["--steps", "2", "--group-size", "2", "--groups-per-step", "2", "--count", "4"]
    done = subprocess.run(
        [*command, *small, "--max-tokens", "4", "--output", "out"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert "greedy reward on 4 held-out tasks" in done.stdout
    assert "thread 'left'" in done.stderr and "it is ended now" in done.stderr
