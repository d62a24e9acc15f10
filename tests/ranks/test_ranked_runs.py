"""`textpolicy train --ranks`: the run of one process, by several, and what its faults leave."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import textpolicy as tp
from tests.ranks.test_launcher import processes_of
from textpolicy.errors import ConfigError
from textpolicy.runs import RunDirectory

STEPS = 4
CONFIG = {
    "task": {"env": "add"},
    "sampling": {"max_tokens": 4},
    "rollout": {"groups_per_step": 3, "group_size": 4},
    "evaluation": {"count": 5, "every": 2},
    "algorithm": {"name": "dapo"},
    "run": {"steps": STEPS},
}
FLAGS = ("--env=add", "--max-tokens=4", "--groups-per-step=3", "--group-size=4", "--count=5")
FLAGS += ("--eval-every=2", "--algorithm=dapo", f"--steps={STEPS}")
REWARD = """
import os, signal, time
from pathlib import Path

def reward(prompt, completion, example):
    fault = Path(__file__).with_name("fault")
    if os.environ.get("MLX_RANK") == "1" and fault.exists():
        name, after = fault.read_text().split()
        checkpoints = Path(__file__).parent / "run" / "checkpoints"
        if (checkpoints / f"{int(after):08d}.safetensors").exists():
            fault.unlink()
            if name == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "raises":
                raise ValueError("the reward has a bug")
            if name == "terminated":
                os.kill(os.getpid(), signal.SIGTERM)
            if name == "hangs":
                time.sleep(1000)
    return float(len(completion) % 3)
"""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "textpolicy", "train", *arguments]


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `textpolicy train` with two ranks."""
    given = command(*arguments, "--ranks", "2", "--backend", "ring")
    return subprocess.run(given, capture_output=True, text=True, timeout=300)


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Return the metrics that do not depend on time and memory."""
    rows = [json.loads(line) for line in RunDirectory(run).metrics.read_text().splitlines()]
    left_out = ("time/", "memory/", "tokens_per_second", "sink_errors")
    return [{n: v for n, v in row.items() if not n.startswith(left_out)} for row in rows]


def weights_of(run: Path) -> str:
    return hashlib.sha256(RunDirectory(run).latest.read_bytes()).hexdigest()


@pytest.mark.slow
def test_two_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    result = train(*FLAGS, "--output", str(tmp_path / "two"), "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["steps"] == STEPS
    assert "rank 1" not in result.stderr
    tp.run(CONFIG, output=tmp_path / "one")
    one, two = (RunDirectory(tmp_path / name) for name in ("one", "two"))
    assert two.samples.read_text() == one.samples.read_text()
    assert json.loads(two.metrics.read_text().splitlines()[0])["time/ranks"] > 0
    for found, expected in zip(rows_of(two.path), rows_of(one.path), strict=True):
        assert found == pytest.approx(expected, rel=1e-2, abs=1e-4)
    with pytest.raises(ConfigError, match="has 2 ranks so far, and is resumed with 1"):
        tp.run({"run": {"steps": STEPS + 1}}, resume=two.path)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of two ranks that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "reward.py").write_text(REWARD)
    done = train(*FLAGS, "--reward", str(folder / "reward.py"), "--output", str(folder / "run"))
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.long
@pytest.mark.proves("F15")
@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        ("killed", 137, "rank 1 ended with exit code 137"),
        ("raises", 1, "the reward has a bug"),
        ("hangs", 75, "--rank-deadline"),
        ("terminated", 143, "resume with"),
    ],
)
def test_a_run_resumes_after_a_fault_of_one_rank(
    whole_run: Path, tmp_path: Path, fault: str, status: int, message: str
) -> None:
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "fault").write_text(f"{fault} 2")
    run = str(tmp_path / "run")
    given = (*FLAGS, "--reward", str(tmp_path / "reward.py"), "--output", run)
    failed = train(*given, "--rank-deadline", "15")
    assert failed.returncode == status, failed.stderr
    assert message in failed.stdout + failed.stderr
    assert processes_of(tmp_path) == ""
    resumed = train("--resume", run)
    assert resumed.returncode == 0, resumed.stderr
    assert rows_of(tmp_path / "run") == rows_of(whole_run)
    assert weights_of(tmp_path / "run") == weights_of(whole_run)


@pytest.fixture
def two_hosts() -> Iterator[list[tuple[list[str], str]]]:
    """Return two network namespaces: the words before a command, and the address of each."""
    names = [f"textpolicy{os.getpid()}{letter}" for letter in "ab"]
    ends = [f"tp{os.getpid() % 10**6}{letter}" for letter in "ab"]
    addresses = ["10.213.7.1", "10.213.7.2"]
    made = [
        *(["netns", "add", name] for name in names),
        ["link", "add", ends[0], "type", "veth", "peer", "name", ends[1]],
    ]
    for name, end, address in zip(names, ends, addresses, strict=True):
        made += [
            ["link", "set", end, "netns", name],
            ["-n", name, "addr", "add", f"{address}/24", "dev", end],
            ["-n", name, "link", "set", end, "up"],
            ["-n", name, "link", "set", "lo", "up"],
        ]
    try:
        for words in made:
            done = subprocess.run(["ip", *words], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no network namespace can be made here: {done.stderr.strip()}")
        hosts = zip(names, addresses, strict=True)
        yield [(["ip", "netns", "exec", name], address) for name, address in hosts]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("ip"), reason="the command ip is not installed")
def test_two_hosts_train_together(
    two_hosts: list[tuple[list[str], str]], whole_run: Path, tmp_path: Path
) -> None:
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"{address}:32323"] for _, address in two_hosts]))
    (tmp_path / "reward.py").write_text(REWARD)
    folders = [tmp_path / name for name in ("run", "nothing")]
    started = [
        subprocess.Popen(
            [*inside, *command(*FLAGS, f"--reward={tmp_path / 'reward.py'}", f"--output={folder}")],
            env=os.environ | {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, ((inside, _), folder) in enumerate(zip(two_hosts, folders, strict=True))
    ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert outputs[1] == ""
    assert not folders[1].exists()
    assert rows_of(folders[0]) == rows_of(whole_run)
    assert weights_of(folders[0]) == weights_of(whole_run)
