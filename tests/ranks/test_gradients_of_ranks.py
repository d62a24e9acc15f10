"""Ranks together take the update that one process takes, and they take it equally."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ranks.training_program import MESSAGES, results
from textpolicy.ranks import ALONE
from textpolicy.ranks.launcher import launch
from textpolicy.training.dealing import deal_by_cost

PROGRAM = "tests.ranks.training_program"
MPIRUN = shutil.which("mpirun", path=Path(sys.executable).parent) or shutil.which("mpirun")
NEEDS_MPI = pytest.mark.skipif(not MPIRUN, reason="Open MPI is not installed")


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Return what one process computes."""
    return results(ALONE)


@pytest.fixture(
    scope="module",
    params=[
        "ring",
        pytest.param("mpi", marks=[pytest.mark.long, NEEDS_MPI]),
    ],
)
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what each of two ranks computes."""
    folder = tmp_path_factory.mktemp("ranks")
    lines: list[str] = []
    command = [sys.executable, "-m", PROGRAM, str(folder)]
    status = launch(command, 2, backend=request.param, deadline=240, tell=lines.append)
    assert status == 0, lines
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def relative_error(found: list[float], expected: list[float]) -> float:
    difference = np.array(found) - np.array(expected)
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


@pytest.mark.proves("F16")
@pytest.mark.parametrize("bits", ["None", "4"])
def test_two_ranks_compute_the_gradient_of_one_process(alone: Any, two: Any, bits: str) -> None:
    for rank in two:
        assert relative_error(rank["gradients"][bits], alone["gradients"][bits]) < 1e-5


@pytest.mark.proves("F16")
def test_a_mean_of_gradients_by_rank_is_another_gradient(alone: Any, two: Any) -> None:
    assert relative_error(two[0]["naive"], alone["gradients"]["None"]) > 1e-2


@pytest.mark.proves("F16")
@pytest.mark.parametrize("bits", ["None", "4"])
def test_ranks_are_equal_to_the_bit_after_five_steps(alone: Any, two: Any, bits: str) -> None:
    first, second = (rank["five"][bits] for rank in two)
    assert first == second
    assert relative_error(first["weights"], alone["five"][bits]["weights"]) < 1e-4
    for found, expected in zip(first["metrics"], alone["five"][bits]["metrics"], strict=True):
        assert found == pytest.approx(expected, rel=2e-2, abs=1e-4)


def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_update_on_all(two: Any) -> None:
    assert [rank["nan"] for rank in two] == [{"skipped": 1.0, "same": True}] * 2


def test_ranks_whose_weights_differ_end_the_run(two: Any) -> None:
    for rank in two:
        equal, differing = rank["complaints"]
        assert equal == ""
        assert differing.startswith("the weights of rank 1 differ from those of rank 0")


def test_parts_are_dealt_by_their_cost_and_tasks_in_contiguous_parts() -> None:
    assert deal_by_cost([5, 1, 1, 3], 2) == [0, 1, 1, 1]
    assert deal_by_cost([4], 3) == [0]
    assert [*ALONE.own_part(3)] == [0, 1, 2]


def test_a_rank_without_rows_takes_the_update_of_the_others(alone: Any, two: Any) -> None:
    for rank in two:
        assert rank["small"] == pytest.approx(alone["small"], rel=1e-5)


def test_messages_of_any_length_and_sums_reach_every_rank(two: Any) -> None:
    for rank in two:
        assert rank["size"] == 2
        assert rank["gathered"] == [[len(MESSAGES[0]), len(MESSAGES[1])]] * 2
        assert rank["first"] == [list(one) for one in MESSAGES]
        assert rank["any"] == [True, False]
        assert rank["sums"] == [[[2.0, 2.0], [2.0, 2.0]], [3.0]]
