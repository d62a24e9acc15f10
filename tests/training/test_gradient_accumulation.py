"""One gradient for an optimizer batch, however many parts it is computed in."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from textpolicy.training.gradient_accumulation import accumulate_gradient


class Slope(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = mx.array([2.0])


def loss_and_count(model):
    return lambda part: ((model.weight * mx.array(part)).mean(), mx.array(len(part)))


def test_gradients_of_parts_are_added():
    model = Slope()
    gradient, values = accumulate_gradient(model, loss_and_count(model), [[1.0, 3.0], [4.0]])
    assert gradient["weight"].item() == 2.0 + 4.0
    assert [(loss.item(), count.item()) for loss, count in values] == [(4.0, 2), (8.0, 1)]


def test_weighted_gradients_are_averaged():
    model = Slope()
    gradient, _ = accumulate_gradient(
        model, loss_and_count(model), [[1.0, 3.0], [5.0]], weight=lambda values: values[1]
    )
    assert gradient["weight"].item() == (2 * 2.0 + 1 * 5.0) / 3


@pytest.mark.parametrize("skipped", [1, 2])
def test_a_skipped_part_gives_its_values_and_no_gradient(skipped):
    model = Slope()
    parts = [[1.0], [4.0]]
    gradient, values = accumulate_gradient(
        model, loss_and_count(model), parts, skip=lambda part: part in parts[-skipped:]
    )
    assert dict(tree_flatten(gradient))["weight"].item() == (1.0 if skipped == 1 else 0.0)
    assert len(values) == 2
