"""Supervised fine-tuning: the loss by hand, padding never learned, training that can stop."""

from itertools import chain, islice

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from textpolicy.adapters.config import AdapterConfig
from textpolicy.adapters.container import AdapterContainer
from textpolicy.errors import TrainingError
from textpolicy.training.sft import (
    Demonstration,
    pad,
    sft_loss,
    shuffled_batches,
    train_sft,
)
from textpolicy.types import Progress

VOCABULARY = 7
STOP = 6


class Bigram(nn.Module):
    """The next token depends on the last one alone: row i of `table` holds the logits after i."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.table = mx.random.normal((VOCABULARY, VOCABULARY), key=mx.random.key(seed))

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.table[tokens]


def demonstration(prompt: list[int], answer: list[int]) -> Demonstration:
    return Demonstration(tokens=prompt + answer, mask=[False] * len(prompt) + [True] * len(answer))


RAGGED = [
    demonstration([1, 2], [3, STOP]),
    demonstration([4], [5, 1, 2, 2, STOP]),
    demonstration([0, 3, 3], [STOP]),
]


def reference(table: np.ndarray, batch: list[Demonstration]) -> tuple[float, np.ndarray]:
    """Loss and gradient of a Bigram in float64, one token at a time."""
    pairs = [
        (before, token)
        for row in batch
        for before, token, counts in zip(row.tokens, row.tokens[1:], row.mask[1:], strict=False)
        if counts
    ]
    loss, gradient = 0.0, np.zeros_like(table)
    for before, token in pairs:
        probabilities = np.exp(table[before]) / np.exp(table[before]).sum()
        loss -= np.log(probabilities[token]) / len(pairs)
        gradient[before] += (probabilities - np.eye(VOCABULARY)[token]) / len(pairs)
    return loss, gradient


def test_loss_and_gradient_of_a_ragged_batch_equal_a_float64_reference():
    model = Bigram()
    (loss, count), gradient = nn.value_and_grad(model, sft_loss)(model, *pad(RAGGED))
    expected_loss, expected_gradient = reference(np.array(model.table, dtype=np.float64), RAGGED)
    assert count.item() == 8
    np.testing.assert_allclose(loss.item(), expected_loss, rtol=1e-6)
    np.testing.assert_allclose(np.array(gradient["table"]), expected_gradient, atol=1e-7)


def test_the_step_from_a_stop_token_into_padding_is_not_learned():
    model = Bigram()
    tokens, mask = pad(RAGGED)
    assert mask.sum(axis=1).tolist() == [2, 5, 1]
    _, gradient = nn.value_and_grad(model, sft_loss)(model, tokens, mask)
    # STOP only ever stands at a row's end: what follows it is padding or nothing.
    assert mx.all(gradient["table"][STOP] == 0)
    assert mx.any(gradient["table"][2, STOP] != 0)


def test_prompt_tokens_are_read_and_not_predicted():
    model = Bigram()
    _, gradient = nn.value_and_grad(model, sft_loss)(model, *pad([demonstration([1, 4, 2], [3])]))
    learned = mx.any(gradient["table"] != 0, axis=1)
    assert learned.tolist() == [row == 2 for row in range(VOCABULARY)]


def test_training_lowers_the_loss_and_reports_token_means():
    model = Bigram()
    losses = [sft_loss(model, *pad(RAGGED))[0].item()]
    reports = []

    def note(report):
        reports.append(report)
        return Progress.MORE

    train_sft(
        model,
        shuffled_batches(RAGGED, 3, seed=0),
        optim.SGD(learning_rate=0.5),
        iterations=5,
        steps_per_report=2,
        on_progress=note,
    )
    assert [report.iteration for report in reports] == [2, 4, 5]
    losses += [report.loss for report in reports]
    assert losses == sorted(losses, reverse=True)
    for report in reports:
        # Eight counted tokens an update: the two rates of a window belong together.
        assert report.tokens_per_second == pytest.approx(8 * report.iterations_per_second)


def test_a_report_weighs_batches_by_their_tokens():
    model = Bigram()
    batches = [[RAGGED[1]], [RAGGED[2]]]
    losses = [sft_loss(model, *pad(batch))[0].item() for batch in batches]
    reports = []
    train_sft(
        model,
        batches,
        optim.SGD(learning_rate=0.0),
        iterations=2,
        steps_per_report=2,
        on_progress=lambda report: reports.append(report) or Progress.MORE,
    )
    assert reports[0].loss == pytest.approx((5 * losses[0] + 1 * losses[1]) / 6)


def test_stop_ends_training_after_that_report():
    model = Bigram()
    reports = []
    train_sft(
        model,
        shuffled_batches(RAGGED, 1, seed=0),
        optim.SGD(learning_rate=0.1),
        iterations=100,
        steps_per_report=1,
        on_progress=lambda report: reports.append(report) or Progress.STOP,
    )
    assert [report.iteration for report in reports] == [1]


def test_an_epoch_shows_every_demonstration_once_in_an_order_the_seed_decides():
    def epoch(seed):
        return list(chain(*islice(shuffled_batches(RAGGED, 2, seed=seed), 2)))

    assert sorted(epoch(0), key=RAGGED.index) == RAGGED
    assert epoch(0) == epoch(0)
    assert any(epoch(0) != epoch(seed) for seed in range(1, 5))


def test_only_trainable_weights_move_and_the_mode_is_restored(load_tiny):
    model, _ = load_tiny()
    adapters = AdapterContainer.from_model(model, AdapterConfig(rank=2), seed=0)
    adapted = {name for name, _ in tree_flatten(model.trainable_parameters())}
    before = dict(tree_flatten(model.parameters()))
    model.eval()
    train_sft(model, [RAGGED] * 2, optim.SGD(learning_rate=0.1), iterations=2)
    after = dict(tree_flatten(model.parameters()))
    moved = {name for name, value in after.items() if not mx.array_equal(value, before[name])}
    assert moved == adapted
    assert not model.training
    adapters.unload()


def test_a_model_with_nothing_to_train_is_refused():
    model = Bigram()
    model.freeze()
    with pytest.raises(TrainingError, match="no trainable weights"):
        train_sft(model, [RAGGED], optim.SGD(learning_rate=0.1), iterations=1)


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(TrainingError, match="lower the learning rate"):
        train_sft(
            Bigram(),
            [RAGGED] * 3,
            optim.SGD(learning_rate=float("inf")),
            iterations=3,
            steps_per_report=1,
        )


@pytest.mark.parametrize("mask", [[False, False], [True, True], []])
def test_a_demonstration_must_have_something_to_learn(mask):
    with pytest.raises(TrainingError, match="at least one token to learn"):
        Demonstration(tokens=[1] * len(mask), mask=mask)
