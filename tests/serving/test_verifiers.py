"""vf-eval of verifiers plays against our server with its train client."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "verifiers_eval.py"
UV = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("verifiers"), reason="the package verifiers is not installed")
@pytest.mark.skipif(UV is None, reason="the program uv, which verifiers needs, is not installed")
def test_the_trace_of_vf_eval_holds_the_token_ids_and_log_probabilities_of_the_server(tmp_path):
    record = tmp_path / "record.json"
    command = [sys.executable, str(SCRIPT), "--tasks", "2", "--output", str(record)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    trace, control, again = json.loads(record.read_text("utf-8"))["rows"]
    assert trace["rollouts"] == trace["same_ids"] == 4 and trace["difference"] == 0.0
    assert control["same_ids"] < 4
    assert again["same_ids"] == 4 and again["difference"] <= 1e-5
