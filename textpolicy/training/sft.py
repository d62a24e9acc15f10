"""Supervised fine-tuning: raise the log-probability of demonstrated tokens.

    loss = - sum of log p(token | tokens before it) / number of counted tokens

Prompt and padding are read but never predicted; the stop token that ends an answer is. Whatever
the model leaves trainable is trained: adapters, or every weight.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Bool, Float, Int
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten

from textpolicy.errors import TrainingError
from textpolicy.training.logprobs import token_logps
from textpolicy.types import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Demonstration:
    """One sequence to imitate: `mask` is True on the answer, its stop token included."""

    tokens: list[int]
    mask: list[bool]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.mask):
            raise ValueError(
                "a demonstration's tokens and mask must have equal length; got "
                f"{len(self.tokens)} and {len(self.mask)}"
            )
        if not any(self.mask) or self.mask[0]:
            raise TrainingError(
                "a demonstration needs at least one token to learn, and a token before it: "
                f"mask is {self.mask}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainReport:
    """Since the last report: mean loss over counted tokens, and rates of this process.

    `iteration` counts finished updates. `tokens_per_second` counts tokens that were learned from.
    """

    iteration: int
    loss: float
    iterations_per_second: float
    tokens_per_second: float


def shuffled_batches(
    demonstrations: Sequence[Demonstration], batch_size: int, *, seed: int
) -> Iterator[list[Demonstration]]:
    """Epochs without end, each in an order that the seed decides; its last batch may be short."""
    if not demonstrations:
        raise TrainingError("there are no demonstrations to train on")
    rng = Random(seed)
    while True:
        order = rng.sample(range(len(demonstrations)), len(demonstrations))
        for start in range(0, len(order), batch_size):
            yield [demonstrations[row] for row in order[start : start + batch_size]]


def train_sft(
    model: nn.Module,
    batches: Iterable[Sequence[Demonstration]],
    optimizer: Optimizer,
    *,
    iterations: int,
    steps_per_report: int = 10,
    on_progress: Callable[[TrainReport], Progress] = lambda report: Progress.MORE,
) -> None:
    """Update the trainable weights once per batch, until `iterations` or a callback's STOP."""
    if not tree_flatten(model.trainable_parameters()):
        raise TrainingError("the model has no trainable weights: attach adapters or unfreeze it")
    was_training = model.training
    window = _Window()
    model.train()
    try:
        for iteration, batch in enumerate(islice(batches, iterations), start=1):
            window.add(*_update(model, optimizer, *pad(batch)))
            if iteration % steps_per_report == 0 or iteration == iterations:
                if on_progress(window.report(iteration)) is Progress.STOP:
                    break
                window = _Window()
    finally:
        model.train(was_training)


def sft_loss(
    model: nn.Module, tokens: Int[mx.array, "batch time"], mask: Bool[mx.array, "batch time"]
) -> tuple[Float[mx.array, ""], Int[mx.array, ""]]:
    """The mean over the batch's counted tokens, however they lie in its rows, and their count."""
    logp, _ = token_logps(model, tokens, mx.ones(tokens.shape[0]))
    count = mx.sum(mask)
    return -mx.sum(mx.where(mask, logp, 0.0)) / count, count


def pad(
    batch: Sequence[Demonstration],
) -> tuple[Int[mx.array, "batch time"], Bool[mx.array, "batch time"]]:
    """Tokens and mask, right-padded to the longest row; the mask is False on padding."""
    length = max(len(row.tokens) for row in batch)
    tokens = [row.tokens + [0] * (length - len(row.tokens)) for row in batch]
    mask = [row.mask + [False] * (length - len(row.mask)) for row in batch]
    return mx.array(tokens), mx.array(mask)


def _update(
    model: nn.Module,
    optimizer: Optimizer,
    tokens: Int[mx.array, "batch time"],
    mask: Bool[mx.array, "batch time"],
) -> tuple[float, int]:
    (loss, count), gradient = nn.value_and_grad(model, sft_loss)(model, tokens, mask)
    optimizer.update(model, gradient)
    mx.eval(model.parameters(), optimizer.state, loss, count)
    return loss.item(), int(count.item())


class _Window:
    """Loss, tokens and the clock since the last report."""

    def __init__(self) -> None:
        self.updates = 0
        self.tokens = 0
        self.loss = 0.0
        self.start = time.perf_counter()

    def add(self, loss: float, tokens: int) -> None:
        self.updates += 1
        self.tokens += tokens
        self.loss += loss * tokens

    def report(self, iteration: int) -> TrainReport:
        loss = self.loss / self.tokens
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} after {iteration} iterations: lower the learning rate"
            )
        seconds = time.perf_counter() - self.start
        return TrainReport(
            iteration=iteration,
            loss=loss,
            iterations_per_second=self.updates / seconds,
            tokens_per_second=self.tokens / seconds,
        )
