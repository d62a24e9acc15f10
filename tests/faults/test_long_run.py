"""A long run takes no more memory, files and processes at its end than at its beginning."""

import json
import sys

import numpy as np
import pytest

from tests.faults.killable_runs import exit_code_of, start_command
from textpolicy.runs import RunDirectory
from textpolicy.tracking.jsonl import read_rows

STEPS, GROUPS, SIZE = 500, 2, 2
MB_A_HUNDRED_STEPS = 1.0
# The reward runs in the process of the run, and knows what this process has.
REWARD = """
import json, os

PAGE = os.sysconf("SC_PAGE_SIZE") / 1e6
CHILDREN = f"/proc/self/task/{os.getpid()}/children"
calls = 0

def reward(completion, example):
    global calls
    calls += 1
    if calls % 4 == 0:
        row = {
            "resident": int(open("/proc/self/statm").read().split()[1]) * PAGE,
            "files": len(os.listdir("/proc/self/fd")),
            "children": len(open(CHILDREN).read().split()),
        }
        with open(os.path.join(os.path.dirname(__file__), "usage.jsonl"), "a") as file:
            file.write(json.dumps(row) + "\\n")
    return float(completion.strip()[:1] == str(example["sum"])[:1])
"""


@pytest.mark.proves("F23")
@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what the process has")
def test_five_hundred_steps_take_no_more_memory_files_and_processes(tmp_path, attempts):
    (tmp_path / "reward.py").write_text(REWARD)
    command = [
        *("train", "--env", "add", "--reward", str(tmp_path / "reward.py")),
        *("--steps", str(STEPS), "--groups-per-step", str(GROUPS), "--group-size", str(SIZE)),
        *("--max-tokens", "2", "--count", "4", "--rank", "2", "--output", str(tmp_path / "run")),
    ]
    process, _hear = start_command(command, tmp_path / "printed.txt")
    process.join(540)
    assert process.exitcode == 0, (tmp_path / "printed.txt").read_text()
    run = RunDirectory(tmp_path / "run")
    assert sum("reward" in row for row in read_rows(run.metrics)) == STEPS
    rows = [json.loads(line) for line in (tmp_path / "usage.jsonl").read_text().splitlines()]
    rows = rows[-STEPS:][50:-2]
    resident = [row["resident"] for row in rows]
    slope = np.polyfit(np.arange(len(resident)), resident, 1)[0] * 100
    assert slope < MB_A_HUNDRED_STEPS, f"{slope:.2f} MB in 100 steps"
    assert len({row["files"] for row in rows}) == 1
    assert {row["children"] for row in rows} == {0}
    assert exit_code_of(process) == 0
    attempts(STEPS)
