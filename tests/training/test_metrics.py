"""Metrics of the trainer: only counted tokens matter, in sums and in extremes."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from tests.batches import batch_of
from tests.training.rows import groups_of
from textpolicy.training.batch import training_rows
from textpolicy.training.metrics import (
    advantage_metrics,
    average_updates,
    policy_metrics,
    sum_micro_batches,
)


def test_extremes_of_ratios_are_those_of_counted_tokens():
    batch = batch_of([[1, 1, 0], [1, 0, 0]], [[-1.0, -1.0, 0.0], [-1.0, 0.0, 0.0]], [1.0, -1.0])
    logp = mx.log(mx.array([[0.2, 0.1, 1.0], [0.3, 1.0, 1.0]]))
    metrics = policy_metrics(logp, mx.zeros(logp.shape), batch)
    ratios = [metrics[f"sampling/importance_sampling_ratio/{end}"].item() for end in ("min", "max")]
    assert ratios == pytest.approx([0.1 * np.e, 0.3 * np.e])


def test_a_micro_batch_without_counted_tokens_adds_no_extreme():
    empty = {"share": 0.0, "share_min": 0.0, "ratio_max": 1.0}
    counted = {"share": 0.25, "share_min": 0.5, "ratio_max": 0.9}
    assert sum_micro_batches([(empty, False), (counted, True)]) == counted
    assert sum_micro_batches([(empty, False), (empty, False)]) == empty


@pytest.mark.parametrize("number", [1e300, math.inf, math.nan, -0.0])
def test_metrics_of_any_advantages_and_losses_are_numbers(number):
    (row, *_) = training_rows(groups_of((2, [3, 3])))
    rows = [replace(row, advantage=value) for value in (1.0, number, -number)]
    assert all(type(value) is float for value in advantage_metrics(rows).values())
    updates = [{"loss": number}, {"loss": -number}]
    assert type(average_updates(updates, with_sampler=True)["loss"]) is float
