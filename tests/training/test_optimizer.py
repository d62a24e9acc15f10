"""The learning rate at each update, and the step of an update."""

import mlx.core as mx
import pytest

from textpolicy.errors import ConfigError
from textpolicy.training.optimizer import build_optimizer


def rates(count: int, **options) -> list[float]:
    optimizer = build_optimizer(1.0, **options)
    parameters = {"w": mx.zeros(1)}
    found = []
    for _ in range(count):
        parameters = optimizer.apply_gradients({"w": mx.ones(1)}, parameters)
        found.append(float(optimizer.learning_rate))
    return found


def test_without_a_schedule_the_rate_stays():
    assert rates(3) == [1, 1, 1]


def test_warm_up_begins_above_zero_and_reaches_the_rate():
    assert rates(5, warmup=3) == pytest.approx([0.25, 0.5, 0.75, 1, 1])


def test_a_linear_schedule_would_be_at_its_end_after_the_last_update():
    assert rates(4, schedule="linear", updates=4) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert rates(4, schedule="linear", updates=4, final_rate=0.6)[2] == pytest.approx(0.8)


def test_a_cosine_follows_the_warm_up():
    found = rates(6, schedule="cosine", warmup=2, updates=6)
    assert found[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert found[3:] == pytest.approx([0.8536, 0.5, 0.1464], abs=1e-4)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_warm_up_longer_than_the_run_rises_to_the_end_and_says_how_far(schedule):
    with pytest.warns(UserWarning, match=r"warmup is 100 updates, and the run has 9.*9% of 1\."):
        found = rates(9, schedule=schedule, warmup=100, updates=9)
    assert found == pytest.approx([(step + 1) / 101 for step in range(9)])


def test_the_first_step_is_as_long_as_the_rate():
    optimizer = build_optimizer(0.01)
    moved = optimizer.apply_gradients({"w": mx.array([5.0])}, {"w": mx.array([0.0])})
    assert moved["w"].item() == pytest.approx(-0.01, rel=1e-4)


def test_weight_decay_does_not_go_through_the_gradient():
    optimizer = build_optimizer(0.1, weight_decay=0.5)
    moved = optimizer.apply_gradients({"w": mx.array([0.0])}, {"w": mx.array([2.0])})
    assert moved["w"].item() == pytest.approx(2 - 0.1 * 0.5 * 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"schedule": "cosine"}, "needs the number of updates"),
        ({"warmup": -1}, "warmup is -1 updates; expected 0 or more"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"final_rate": 0.1}, "a constant learning rate does not decay"),
        ({"final_rate": -0.1, "schedule": "linear", "updates": 3}, "final_rate is -0.1"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(**({"learning_rate": 1.0} | options))
