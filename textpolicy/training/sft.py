"""Supervised fine-tuning: raise the log-probability of demonstrated tokens.

    loss = - sum of log p(token | tokens before it) / number of counted tokens

Prompt and padding are read but never predicted; the stop token that ends an answer is. Whatever
the model leaves trainable is trained: adapters, or every weight.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from itertools import islice
from random import Random

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Bool, Float, Int
from mlx.optimizers import Optimizer

from textpolicy.errors import TrainingError
from textpolicy.training.logprobs import token_logps

# Lengths are rounded up to a multiple of this, so that few shapes are compiled.
_LENGTH_STEP = 8


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
        if not any(self.mask[1:]) or self.mask[0]:
            raise TrainingError(
                "a demonstration needs at least one token to learn, and a token before it: "
                f"mask is {self.mask}"
            )


class Progress(Enum):
    """What a callback answers: go on, or stop after this event."""

    MORE = auto()
    STOP = auto()


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
    """Epochs without end, each in a new order that the seed decides; the last batch may be short."""
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
    if not model.trainable_parameters():
        raise TrainingError("the model has no trainable weights: unfreeze it or attach adapters")
    step = _compiled_step(model, optimizer)
    window = _Window(iteration=0)
    was_training = model.training
    model.train()
    try:
        for iteration, batch in enumerate(islice(batches, iterations), start=1):
            loss, count = step(*pad(batch))
            mx.eval(model.parameters(), optimizer.state, loss, count)
            window.add(loss.item(), int(count.item()))
            if iteration % steps_per_report == 0 or iteration == iterations:
                report = window.close(iteration)
                if on_progress(report) is Progress.STOP:
                    break
    finally:
        model.train(was_training)


def sft_loss(
    model: nn.Module, tokens: Int[mx.array, "batch time"], mask: Bool[mx.array, "batch time"]
) -> tuple[Float[mx.array, ""], Int[mx.array, ""]]:
    """The mean over the batch's counted tokens, however they are spread over rows, and their count."""
    logp, _ = token_logps(model, tokens, mx.ones(tokens.shape[0]))
    count = mx.sum(mask)
    return -mx.sum(mx.where(mask, logp, 0.0)) / count, count


def pad(
    batch: Sequence[Demonstration],
) -> tuple[Int[mx.array, "batch time"], Bool[mx.array, "batch time"]]:
    """Tokens and mask, right-padded to one length; the mask is False on padding."""
    longest = max(len(row.tokens) for row in batch)
    length = math.ceil(longest / _LENGTH_STEP) * _LENGTH_STEP
    tokens = [row.tokens + [0] * (length - len(row.tokens)) for row in batch]
    mask = [row.mask + [False] * (length - len(row.mask)) for row in batch]
    return mx.array(tokens), mx.array(mask)


def _compiled_step(
    model: nn.Module, optimizer: Optimizer
) -> Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]:
    loss_and_grad = nn.value_and_grad(model, sft_loss)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(tokens: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
        (loss, count), gradient = loss_and_grad(model, tokens, mask)
        optimizer.update(model, gradient)
        return loss, count

    return step


class _Window:
    """Losses, tokens and the clock since the last report."""

    def __init__(self, *, iteration: int) -> None:
        self.iteration = iteration
        self.total = 0.0
        self.tokens = 0
        self.start = time.perf_counter()

    def add(self, loss: float, tokens: int) -> None:
        self.total += loss * tokens
        self.tokens += tokens

    def close(self, iteration: int) -> TrainReport:
        """The report up to `iteration`; the next window starts empty."""
        loss = self.total / self.tokens
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} after {iteration} iterations: lower the learning rate"
            )
        seconds = time.perf_counter() - self.start
        report = TrainReport(
            iteration=iteration,
            loss=loss,
            iterations_per_second=(iteration - self.iteration) / seconds,
            tokens_per_second=self.tokens / seconds,
        )
        self.__init__(iteration=iteration)
        return report
