"""The estimates before a run of SmolLM2-135M, against what sampling and training then take."""

import gc
from importlib import import_module
from pathlib import Path

import pytest

from tests.real.conftest import FOLDER
from textpolicy import fast_cpu
from textpolicy.config import TrainConfig, changed
from textpolicy.experiment.run_size import SizeEstimator
from textpolicy.experiment.tasks import find_task

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def plans(monkeypatch, real_model):
    """Return the script that compares plans with measurements."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("plans")


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        {"groups": 1, "group_size": 4, "prompt": 45, "completion": 12},
        {"groups": 1, "group_size": 4, "prompt": 32, "quantize": {"bits": 4, "mode": "affine"}},
    ],
    ids=["float32", "4 bits"],
)
def test_memory_peaks_where_the_plan_says(plans, case):
    case = plans.Case(**case)
    gc.collect()
    planned, measured = plans.plan(case, str(FOLDER)).peaks, plans.measure(case, str(FOLDER))
    for phase, peak in planned.items():
        assert peak == pytest.approx(measured[phase], rel=0.2), phase


@pytest.mark.slow
def test_a_step_takes_the_time_that_was_estimated(plans):
    """Within a factor of three, because other programs may run at one of both moments."""
    values = {"task.env": "sort", "model.name": str(FOLDER), "sampling.max_tokens": 12}
    values |= {"rollout.groups_per_step": 2, "rollout.group_size": 4, "evaluation.count": 4}
    config = changed(TrainConfig(), values)
    threads = fast_cpu.enable().threads
    fast_cpu.set_threads(1)
    estimator = SizeEstimator(config, find_task(config.task, 0)[0])
    estimated = estimator.plan_time(config).step
    prompt, completion = map(round, estimator.lengths.usual)
    case = plans.Case(groups=2, group_size=4, prompt=prompt, completion=completion)
    measured = sum(plans.measure(case, str(FOLDER))["seconds"].values())
    if threads:
        fast_cpu.set_threads(threads)
    assert measured / 3 < estimated < 3 * measured
