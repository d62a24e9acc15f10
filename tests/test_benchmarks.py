"""The scripts in benchmarks/ run as a user runs them, each with its smallest sizes.

Some scripts take minutes, or need packages that are not installed here. A quick test therefore
checks every name that the scripts in benchmarks/, tools/ and examples/ import from TextPolicy.
"""

import ast
import importlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = sorted(
    path for name in ("benchmarks", "tools", "examples") for path in (ROOT / name).rglob("*.py")
)
MACHINE = {"machine", "processor", "device", "blas", "threads"}
VERSIONS = {"python", "textpolicy", "mlx", "mlx-lm"}
STEP = "--prompts 1 --group-size 2 --prompt-tokens 8 --completion-tokens 8 --warm-up 0"
SMALLEST = {
    "adapters.py": "--only times --json",
    "compiled.py": "--lengths 2+2 --runs 1 --json",
    "first_scores.py": "--env add --rows 2 --seconds 2",
    "functions.py": "--tokens 96 --runs 1 --json",
    "gated_delta.py": "--tokens 32 --runs 1 --json",
    "generate.py": "--rows 1 --runs 1 --threads 1 --json",
    "generation_versions.py": "--names rows,sleeping --runs 1 --threads 1 --json",
    "grpo_step.py": f"{STEP} --model {ROOT}/textpolicy/tiny --layers 1 --runs 1 --threads 1 --json",
    "long.py": "--tokens 32 --json",
    "outside.py": "--engines mlx-lm llama.cpp --adapters ranks --json",
    "products.py": "--size 64 --json",
    "prompt_sharing.py": "--prompt-tokens 8 --completion-tokens 8 --group-size 2 --runs 1 --json",
    "rewards.py": "",
    "scaling.py": "--only rank --runs 1 --json",
    "serving.py": "--clients 2 --max-tokens 4 --runs 1 --threads 1 --json",
    "stop_strings.py": "--rows 2 --tokens 16 --runs 1 --threads 1 --json",
}
LONGER = (
    "collapse.py",
    "kept_cache.py",
    "learning.py",
    "math_verifier.py",
    "packed_bandwidth.py",
    "plans.py",
    "rank.py",
    "rates.py",
    "real_learning.py",
    "sft.py",
    "staleness.py",
    "simulate.py",
    "verifiers_eval.py",
    "workers.py",
)
COUNTS = dict.fromkeys(
    [
        "compiled",
        "functions",
        "gated_delta",
        "generate",
        "generation_versions",
        "grpo_step",
        "packed_bandwidth",
        "prompt_sharing",
        "scaling",
        "serving",
        "stop_strings",
    ],
    "--runs",
)


@pytest.fixture
def run_here(monkeypatch):
    """Return a function that runs a script in this process, and returns its exit code."""

    def run(script: str, *options: str) -> object:
        path = str(BENCHMARKS / script)
        monkeypatch.setattr(sys, "argv", [path, *options])
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(path, run_name="__main__")
        return stopped.value.code

    return run


def printed(script: str, options: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *options.split()]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


# Sixteen episodes one after the other, which wait for half a minute.
ALONE = "--names sleeping_alone --runs 1 --threads 1 --json"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options"),
    [
        *(pytest.param(*pair, id=pair[0]) for pair in SMALLEST.items()),
        pytest.param("generation_versions.py", ALONE, marks=pytest.mark.long, id="alone"),
    ],
)
def test_a_record_describes_the_machine_and_the_versions(script, options):
    record = json.loads(printed(script, options))
    setting = record.pop("setting")
    assert setting.keys() >= MACHINE | VERSIONS
    assert all(setting[name] for name in ("machine", "processor", "device", *VERSIONS))
    assert setting["threads"] in (1, None) or script == "rewards.py"
    assert setting.get("runs") == (1 if "--runs" in options else None)
    assert any(record.values())


@pytest.mark.slow
@pytest.mark.parametrize("script", LONGER)
def test_a_script_that_takes_minutes_prints_its_options(script, run_here, capsys):
    assert run_here(script, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: {script}")


def imported_names(script: Path) -> list[tuple[str, str]]:
    nodes = ast.walk(ast.parse(script.read_text("utf-8")))
    found = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    ours = [node for node in found if node.module.split(".")[0] == "textpolicy"]
    return [(node.module, alias.name) for node in ours for alias in node.names]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_name_that_a_script_imports_from_textpolicy_exists(script):
    for module, name in imported_names(script):
        if not hasattr(importlib.import_module(module), name):
            importlib.import_module(f"{module}.{name}")


@pytest.mark.parametrize(("script", "flag"), [*COUNTS.items(), ("sft", "--repeats")])
def test_a_median_of_no_runs_is_refused(script, flag, run_here, capsys):
    assert run_here(f"{script}.py", flag, "0") == 2
    assert f"{flag} is 0; expected at least 1" in capsys.readouterr().err
