"""benchmarks/simulate.py: cases whose outcome is known, and costs that are read from a record."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("simulate")


@pytest.fixture
def equal(script) -> Any:
    """A run in which every completion has 10 tokens, and sampling takes as long as an update."""
    costs = script.Costs(decode_step=0.1, decode_row=0, update=1.0, update_token=0, adapter_bytes=0)
    return script.Setup(costs=costs, groups=4, size=2, mean_length=10, spread=0, delay=0)


def test_one_process_takes_the_sum_of_sampling_and_update(script, equal):
    assert script.simulate(equal).rate == pytest.approx(4 * 2 / (1.0 + 1.0))


def test_a_worker_as_fast_as_the_trainer_doubles_the_rate(script, equal):
    found = script.simulate(replace(equal, workers=1, staleness=1))
    assert found.rate == pytest.approx(2 * script.simulate(equal).rate)
    assert found.trainer_idle == pytest.approx(0, abs=0.01)


def test_a_worker_gains_nothing_if_it_may_not_run_ahead(script, equal):
    found = script.simulate(replace(equal, workers=1, staleness=0))
    assert found.rate == pytest.approx(script.simulate(equal).rate)
    assert found.staleness == 0


def test_two_processes_on_one_core_are_no_faster_than_one(script, equal):
    found = script.simulate(replace(equal, workers=1, staleness=1, cores=1))
    assert found.rate == pytest.approx(script.simulate(equal).rate, rel=0.02)


def test_a_worker_that_halves_the_speed_of_the_trainer_gives_nothing(script, equal):
    found = script.simulate(replace(equal, workers=1, staleness=1, beside_another=0.5))
    assert found.rate == pytest.approx(script.simulate(equal).rate, rel=0.02)


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_no_group_is_staler_than_the_bound(script, equal, bound):
    setup = replace(equal, workers=3, staleness=bound, spread=1.0, mean_length=40)
    run = script._Simulation(setup, script.Random(0), 40)
    run.run()
    assert max(run.ages) <= bound
    assert len(run.ages) == 40
    assert (run.dropped > 0) is (bound > 0)


def test_sampling_without_updates_grows_with_the_workers(script, equal):
    costs = replace(equal.costs, decode_step=0, decode_row=0.01, update=1e-9)
    one = replace(equal, costs=costs, workers=1, staleness=1, groups=64)
    many = replace(one, workers=16)
    assert script.simulate(many).rate == pytest.approx(16 * script.simulate(one).rate, rel=0.05)


def test_ranks_divide_the_update_and_pay_for_the_exchange(script, equal):
    costs = replace(equal.costs, decode_step=0, update=0, update_token=0.01)
    free = script.simulate(replace(equal, costs=costs, ranks=2)).rate
    one = script.simulate(replace(equal, costs=costs)).rate
    assert free == pytest.approx(2 * one, rel=0.01)
    dear = replace(equal, costs=replace(costs, adapter_bytes=1e8), ranks=2)
    assert script.simulate(dear).rate < free / 2


def test_a_simulation_repeats_itself(script, equal):
    setup = replace(equal, workers=2, staleness=2, spread=0.6)
    assert script.simulate(setup, seed=3) == script.simulate(setup, seed=3)
    assert script.simulate(setup, seed=3) != script.simulate(setup, seed=4)


def test_the_costs_explain_the_two_measured_steps(script):
    phases = [
        {"num_tokens": 100.0, "time/generate": 1.5, "time/train": 3.0, "whole step": 5.0},
        {"num_tokens": 200.0, "time/generate": 2.5, "time/train": 4.0, "whole step": 7.0},
    ]
    costs = script.costs_of(phases, longest=5)
    assert costs.decode_row == pytest.approx(0.01)
    assert costs.decode_step == pytest.approx(0.1)
    assert (costs.update, costs.update_token) == pytest.approx((2.0, 0.01))
    assert costs.between == pytest.approx(0.5)
