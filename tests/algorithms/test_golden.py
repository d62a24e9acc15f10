"""Losses, advantages and KL estimates agree with recorded numbers of another library."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from textpolicy.algorithms import dr_grpo, grpo, lite_ppo, maxrl, rloo
from textpolicy.algorithms.parts.kl import k1, k2, k3

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"


def golden(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "golden.py"), "--data", str(folder)]
    return subprocess.run(command, capture_output=True, text=True)


def test_every_case_agrees_to_the_seventh_digit():
    result = golden(GOLDEN)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "32 of 32 cases agree to 1e-06"


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the folder with two of the cases, for tests that change it."""
    shutil.copy(GOLDEN / "golden.npz", tmp_path)
    record = json.loads((GOLDEN / "golden.json").read_text())
    keep = ("sapo|token|beta=0.04", "grpo|delta=1.5")
    record["cases"] = {name: record["cases"][name] for name in keep}
    (tmp_path / "golden.json").write_text(json.dumps(record))
    return tmp_path


def edit(folder: Path, change) -> None:
    path = folder / "golden.json"
    record = json.loads(path.read_text())
    change(record["cases"]["grpo|delta=1.5"])
    path.write_text(json.dumps(record))


def test_a_loss_that_is_off_by_a_hundred_thousandth_fails(copy):
    edit(copy, lambda case: case.update(loss=case["loss"] + 1e-5))
    result = golden(copy)
    assert result.returncode == 1
    assert "1 of 2 cases agree" in result.stdout


def test_one_element_of_a_gradient_that_is_off_fails(copy):
    arrays = dict(np.load(copy / "golden.npz"))
    arrays["grad::grpo|delta=1.5"][2, 0, 3] += 1e-5
    np.savez(copy / "golden.npz", **arrays)
    assert golden(copy).returncode == 1


def test_an_unknown_option_fails(copy):
    edit(copy, lambda case: case["kwargs"].update(novelty=3))
    result = golden(copy)
    assert result.returncode == 1
    assert "not supported: options ['novelty'] are unknown" in result.stdout


@pytest.mark.parametrize(
    ("name", "compute_advantages"),
    [
        ("group", grpo.compute_advantages),
        ("batch", lite_ppo.compute_advantages),
        ("none", dr_grpo.compute_advantages),
        ("rloo", rloo.compute_advantages),
        ("max_rl", maxrl.compute_advantages),
    ],
)
def test_advantages_agree(name, compute_advantages):
    record = json.loads((GOLDEN / "golden.json").read_text())
    rewards = np.load(GOLDEN / "golden.npz")["rewards"].reshape(-1, record["shape"]["G"])
    advantages = compute_advantages(mx.array(rewards, dtype=mx.float32)).flatten()
    assert advantages.tolist() == pytest.approx(record["advantages"][name], abs=1e-6)


@pytest.mark.parametrize(("name", "estimator"), [("k1", k1), ("k2", k2), ("k3", k3)])
def test_kl_estimates_agree(name, estimator):
    record = json.loads((GOLDEN / "golden.json").read_text())
    arrays = np.load(GOLDEN / "golden.npz")
    mask = arrays["mask"].astype(bool)

    def logp(logits):
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return np.take_along_axis(logprobs, arrays["ids"][..., None], -1)[..., 0]

    distance = mx.array(logp(arrays["ref_logits"]) - logp(arrays["logits"]), dtype=mx.float32)
    estimates = np.array(estimator(distance, mx.ones_like(distance)))
    assert estimates[mask].mean() == pytest.approx(record["kl"][name], abs=1e-6)
