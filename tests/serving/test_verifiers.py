"""verifiers plays its tasksets against our server: for vf-eval, and as an agent that is trained."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest

import textpolicy as tp
from textpolicy.environments import load
from textpolicy.errors import ConfigError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "verifiers_eval.py"
UV = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


needs_verifiers = pytest.mark.skipif(
    not find_spec("verifiers") or UV is None,
    reason="the package verifiers, or the program uv that it needs, is not installed",
)


@pytest.mark.slow
@needs_verifiers
def test_the_trace_of_vf_eval_holds_the_token_ids_and_log_probabilities_of_the_server(tmp_path):
    record = tmp_path / "record.json"
    command = [sys.executable, str(SCRIPT), "--tasks", "2", "--output", str(record)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    trace, control, again = json.loads(record.read_text("utf-8"))["rows"]
    assert trace["rollouts"] == trace["same_ids"] == 4 and trace["difference"] == 0.0
    assert control["same_ids"] < 4
    assert again["same_ids"] == 4 and again["difference"] <= 1e-5


@pytest.mark.slow
@needs_verifiers
def test_a_taskset_of_verifiers_is_an_environment_that_a_run_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(str(UV)).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.syspath_prepend(str(SCRIPT.parent / "verifiers_tasks"))
    environment = load("verifiers:doubling")
    held_out = {task.prompt for task in environment.heldout(50)}
    assert len(held_out) == 10
    assert not held_out & {task.prompt for task in islice(environment.stream(0), 200)}
    tp.run(
        {
            "task": {"env": "verifiers:doubling", "agent_processes": 2},
            "rollout": {"groups_per_step": 1, "group_size": 2},
            "sampling": {"max_tokens": 5},
            "evaluation": {"count": 2},
            "run": {"steps": 1},
        },
        output=tmp_path / "run",
    )
    lines = (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    (step,) = [found for found in map(json.loads, lines) if "rollout/segments" in found]
    assert step["reward"] in (0.0, 0.5, 1.0) and step["rollout/segments"] == 1.0
    # The trainer computes the log-probabilities of the very tokens that were sampled.
    assert step["sampling/sampling_logp_difference/mean"] < 1e-4


def test_a_taskset_needs_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "verifiers", None)
    with pytest.raises(ConfigError, match=r"pip install 'textpolicy\[verifiers\]'"):
        load("verifiers:doubling")
