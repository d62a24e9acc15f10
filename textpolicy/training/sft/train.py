"""Supervised fine-tuning: raise the log-probability of demonstrated tokens.

Prompt and padding are read but never predicted; the stop token that ends an answer is. Whatever
the model leaves trainable is trained: adapters, or every weight.
"""

import math
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy import fast_cpu
from textpolicy.adapters.container import AdapterContainer
from textpolicy.adapters.files.adapter_file import prepare_adapter_path
from textpolicy.errors import ConfigError, DataError, TrainingError
from textpolicy.training.checkpointing import recompute_activations
from textpolicy.training.sft.batches import (
    BatchStream,
    Epochs,
    PackedRow,
    batches_by_length,
    make_sft_batch,
)
from textpolicy.training.sft.checkpoint import restore_progress, save_progress
from textpolicy.training.sft.data import demonstration_digest
from textpolicy.training.sft.demonstrations import Demonstration
from textpolicy.training.sft.encoding import Encoding
from textpolicy.training.sft.events import (
    Event,
    SaveReport,
    TrainReport,
    ValidationReport,
)
from textpolicy.training.sft.loss import BatchLoss, SFTLoss, make_batch_loss
from textpolicy.training.sft.packing import check_packable
from textpolicy.training.sft.parameters import SFTParameters
from textpolicy.types import Progress, asks_to_stop

Example = Demonstration | str | Mapping[str, Any]
"""Tokens, a text, or a row in one of the forms that `Encoding` knows."""
Ended = Literal["finished", "stopped", "early"]


@dataclass(frozen=True, kw_only=True)
class SFTResult:
    """`iteration` updates lie behind. `ended` is "stopped" by a callback, "early" for patience.

    `best_iteration` had the lowest validation loss; its adapters are in the parameters' best file.
    """

    iteration: int
    ended: Ended
    validation_loss: float | None
    best_loss: float | None
    best_iteration: int | None


def train_sft(
    model: nn.Module,
    train: Sequence[Example] | BatchStream,
    validate: Sequence[Example],
    optimizer: Optimizer,
    *,
    parameters: SFTParameters | None = None,
    tokenizer: TokenizerWrapper | None = None,
    loss: SFTLoss | None = None,
    resume: str | Path | None = None,
    on_progress: Callable[[Event], Progress | None] | None = None,
) -> SFTResult:
    """Update the trainable weights until all iterations are done, or a callback's STOP.

    Data are a list, or anything else of a known length that can be read again and again.

    Validation comes before the first update, every so often, and after the last. However training
    ends, the adapters and a checkpoint to go on from are saved if there is a path for them.
    `resume` is such a checkpoint; model, data and settings are then given as they were.
    """
    fast_cpu.enable()
    parameters = parameters or SFTParameters()
    if not tree_flatten(model.trainable_parameters()):
        raise TrainingError("the model has no trainable weights: attach adapters or unfreeze it")
    if not isinstance(train, BatchStream):
        _check_data("train", train)
    _check_data("validate", validate)
    source = train if isinstance(train, BatchStream) else _epochs(train, parameters, tokenizer)
    if parameters.packing:
        with _in_mode(model, training=False):
            check_packable(model)
    validation = _encoded(validate, parameters, tokenizer)
    if parameters.patience and not validation:
        raise ConfigError(
            f"patience is {parameters.patience}, and there is nothing to validate on: give "
            "validation data, or leave patience out"
        )
    run = _Run(
        model=model,
        optimizer=optimizer,
        parameters=parameters,
        validation=validation,
        loss=make_batch_loss(model, loss),
        course=_course(source, parameters),
    )
    if resume is not None:
        run.restore(Path(resume))
    with _in_mode(model, training=True):
        for event in run.events(source.updates(run.iteration)):
            if on_progress is not None and asks_to_stop(on_progress(event)):
                run.ended = "stopped"
                break
    run.finish()
    return run.result()


def evaluate_sft(
    model: nn.Module,
    data: Sequence[Example],
    *,
    batch_size: int = 4,
    batches: int = 0,
    loss: SFTLoss | None = None,
    tokenizer: TokenizerWrapper | None = None,
    max_length: int = 2048,
) -> float:
    """The mean loss over the learned tokens of all data, or of so many batches of it."""
    parameters = SFTParameters(
        batch_size=batch_size, validation_batches=batches, max_length=max_length
    )
    _check_data("data", data)
    demonstrations = _encoded(data, parameters, tokenizer)
    if not demonstrations:
        raise TrainingError("there are no demonstrations to evaluate on")
    return _evaluate(model, demonstrations, make_batch_loss(model, loss), parameters)


def iterations_of(
    epochs: int, demonstrations: Sequence[Demonstration], parameters: SFTParameters
) -> int:
    """How many updates so many epochs of the data take."""
    source = _epochs(demonstrations, parameters, None)
    return sum(len(source.epoch(number)) for number in range(epochs))


@dataclass(kw_only=True)
class _Window:
    """Since the last report: loss and tokens, and of this process alone, updates and seconds."""

    loss: float = 0.0
    tokens: int = 0
    timed_updates: int = 0
    timed_tokens: int = 0
    seconds: float = 0.0

    def add(self, loss: float, tokens: int, seconds: float) -> None:
        self.loss += loss * tokens
        self.tokens += tokens
        self.timed_updates += 1
        self.timed_tokens += tokens
        self.seconds += seconds

    def report(self, iteration: int, learning_rate: float) -> TrainReport:
        return TrainReport(
            iteration=iteration,
            loss=self.loss / self.tokens,
            iterations_per_second=self.timed_updates / self.seconds,
            tokens_per_second=self.timed_tokens / self.seconds,
            learning_rate=learning_rate,
        )


@dataclass(kw_only=True)
class _Validated:
    """How validation has gone so far."""

    last: float | None = None
    last_iteration: int | None = None
    best: float | None = None
    best_iteration: int | None = None
    worse: int = 0

    def add(self, loss: float, iteration: int) -> bool:
        """Whether this is the best so far."""
        self.last, self.last_iteration = loss, iteration
        if self.best is None or loss < self.best:
            self.best, self.best_iteration, self.worse = loss, iteration, 0
            return True
        self.worse += 1
        return False


@dataclass(kw_only=True)
class _Run:
    """One run: the events of its course, and the state that they leave."""

    model: nn.Module
    optimizer: Optimizer
    parameters: SFTParameters
    validation: Sequence[Demonstration]
    loss: BatchLoss
    course: Mapping[str, Any]
    ended: Ended = "finished"
    window: _Window = field(default_factory=_Window)
    validated: _Validated = field(default_factory=_Validated)
    saved: int | None = None

    def __post_init__(self) -> None:
        self.iteration = self.parameters.completed_iterations
        self.adapters = AdapterContainer.of(self.model)
        self._value_and_grad = nn.value_and_grad(self.model, self.loss)
        self._checked = False
        if self.parameters.adapter_file is None:
            return
        prepare_adapter_path(self.parameters.adapter_file)
        if self.adapters is None:
            raise ConfigError(
                f"adapter_path is {self.parameters.adapter_path}, and the model has no adapters to "
                "save there: attach some, or save the weights yourself when training is done"
            )

    def events(self, updates: Iterator[Sequence[PackedRow]]) -> Generator[Event]:
        """Train, and yield what happens as it happens; whoever stops listening stops the run."""
        yield from self._due()
        for rows in islice(updates, self.parameters.iterations - self.iteration):
            if self._out_of_patience():
                self.ended = "early"
                break
            self._update(rows)
            yield from self._due()
        if self.window.timed_updates:
            yield self._report()
        if self.validation and self.validated.last_iteration != self.iteration:
            yield self._validate()
        if self.parameters.adapter_file and self.saved != self.iteration:
            yield self._save()

    def _due(self) -> Generator[Event]:
        """What falls on this iteration and has not been done."""
        now, parameters, validated = self.iteration, self.parameters, self.validated
        falls = now % parameters.steps_per_report == 0 or now == parameters.iterations
        if falls and self.window.timed_updates:
            yield self._report()
        falls = now % parameters.steps_per_eval == 0 or validated.last is None
        if self.validation and falls and validated.last_iteration != now:
            yield self._validate()
        falls = now % parameters.save_every == 0 and now > 0
        if parameters.adapter_file and falls and self.saved != now:
            yield self._save()

    def _out_of_patience(self) -> bool:
        patience = self.parameters.patience
        return patience is not None and self.validated.worse >= patience

    def finish(self) -> None:
        """Save what a callback's STOP left unsaved."""
        if self.parameters.adapter_file and self.saved != self.iteration:
            self._save()

    def result(self) -> SFTResult:
        return SFTResult(
            iteration=self.iteration,
            ended=self.ended,
            validation_loss=self.validated.last,
            best_loss=self.validated.best,
            best_iteration=self.validated.best_iteration,
        )

    def restore(self, path: Path) -> None:
        """Take up the run where the checkpoint left it."""
        iteration, progress = restore_progress(path, self.model, self.optimizer, self.course)
        begun = self.parameters.completed_iterations
        if begun not in (0, iteration):
            raise ConfigError(
                f"completed_iterations is {begun}, and {path} was written after {iteration}; with "
                "a checkpoint, leave it out"
            )
        self.iteration = self.saved = iteration
        self.window = _Window(**progress["window"])
        self.validated = _Validated(**progress["validated"])
        if self.adapters:
            self.adapters.version = progress["version"]
        self._checked = self.iteration > 0

    def _update(self, rows: Sequence[PackedRow]) -> None:
        started = time.perf_counter()
        loss, tokens, gradient = self._gradient(rows)
        size = _largest(gradient)
        _check_finite(self.iteration, "loss", loss)
        _check_finite(self.iteration, "gradient", size)
        if size == 0 and not self._checked:
            raise TrainingError(
                "the gradient of the first update is exactly zero: the loss does not depend on the "
                "trainable weights. Is it computed from what the model returns?"
            )
        self._checked = True
        self.optimizer.update(self.model, gradient)
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        if self.adapters:
            self.adapters.advance()
        self.iteration += 1
        self.window.add(loss, tokens, time.perf_counter() - started)

    def _gradient(self, rows: Sequence[PackedRow]) -> tuple[float, int, Any]:
        """Mean loss, learned tokens and gradient of an update, one batch in memory at a time."""
        size = self.parameters.batch_size
        # A stream's batches are as large as whoever draws them wants, in equal shares.
        parts = [rows[at : at + size] for at in range(0, len(rows), size)]
        sums: list[tuple[float, int]] = []
        total: Any = None
        for part in parts:
            loss, tokens, gradient = self._batch_gradient(part)
            if len(parts) > 1:
                gradient = tree_map(lambda g, n=tokens: g * n, gradient)
                gradient = gradient if total is None else tree_map(mx.add, total, gradient)
                mx.eval(gradient)
            total = gradient
            sums.append((loss * tokens, tokens))
        tokens = sum(count for _, count in sums)
        _check_counted(tokens)
        if len(parts) > 1:
            total = tree_map(lambda g: g / tokens, total)
        return sum(value for value, _ in sums) / tokens, tokens, total

    def _batch_gradient(self, rows: Sequence[PackedRow]) -> tuple[float, int, Any]:
        again = self.parameters.checkpoint_gradients
        with recompute_activations(self.model) if again else nullcontext():
            (loss, tokens), gradient = self._value_and_grad(make_sft_batch(rows))
        mx.eval(loss, tokens, gradient)
        return float(loss), int(tokens), gradient

    def _report(self) -> TrainReport:
        report = self.window.report(self.iteration, float(self.optimizer.learning_rate))
        self.window = _Window()
        return report

    def _validate(self) -> ValidationReport:
        started = time.perf_counter()
        loss = _evaluate(self.model, self.validation, self.loss, self.parameters)
        _check_finite(self.iteration, "validation loss", loss)
        best = self.validated.add(loss, self.iteration)
        if best and self.adapters and self.parameters.best_file:
            self.adapters.publish(self.parameters.best_file)
        seconds = time.perf_counter() - started
        return ValidationReport(iteration=self.iteration, loss=loss, seconds=seconds)

    def _save(self) -> SaveReport:
        path, checkpoint = self.parameters.adapter_file, self.parameters.checkpoint_file
        assert path and checkpoint and self.adapters
        self.adapters.publish(path)
        past = {"timed_updates": 0, "timed_tokens": 0, "seconds": 0.0}
        progress = {
            "course": self.course,
            "version": self.adapters.version,
            "window": asdict(self.window) | past,
            "validated": asdict(self.validated),
        }
        save_progress(checkpoint, self.iteration, self.model, self.optimizer, progress)
        self.saved = self.iteration
        return SaveReport(iteration=self.iteration, path=path)


def _evaluate(
    model: nn.Module,
    demonstrations: Sequence[Demonstration],
    loss: BatchLoss,
    parameters: SFTParameters,
) -> float:
    size, count = parameters.batch_size, parameters.validation_batches
    if count:
        # The first of a fixed shuffle, since data is often sorted by something.
        number = min(count * size, len(demonstrations))
        demonstrations = Random(0).sample(demonstrations, number)
    total, tokens = 0.0, 0
    with _in_mode(model, training=False):
        for rows in batches_by_length(demonstrations, size):
            mean, counted = loss(make_sft_batch(rows))
            total += float(mean) * int(counted)
            tokens += int(counted)
    _check_counted(tokens)
    return total / tokens


def _check_counted(tokens: int) -> None:
    if tokens < 1:
        raise TrainingError(
            f"the loss is the mean of {tokens} tokens; expected at least 1. Let it return how many "
            "targets it takes the mean of, such as mask.sum()"
        )


@contextmanager
def _in_mode(model: nn.Module, *, training: bool) -> Generator[None]:
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


def _largest(gradient: Any) -> float:
    """The largest number in it, without sign; not finite where any number is not."""
    arrays = cast(list[tuple[str, mx.array]], tree_flatten(gradient))
    return float(mx.stack([mx.abs(array).max().astype(mx.float32) for _, array in arrays]).max())


def _check_finite(iteration: int, what: str, value: float) -> None:
    # Before anything is updated or saved: what was saved is still good to go on from.
    if not math.isfinite(value):
        raise TrainingError(
            f"the {what} is {value} after {iteration} iterations: lower the learning rate, or "
            "compute in float32. What was saved before is as it was"
        )


def _epochs(
    train: Sequence[Example], parameters: SFTParameters, tokenizer: TokenizerWrapper | None
) -> Epochs:
    return Epochs(
        _encoded(train, parameters, tokenizer),
        parameters.batch_size * parameters.accumulation,
        parameters.seed,
        parameters.max_length if parameters.packing else None,
    )


def _check_data(name: str, data: object) -> None:
    """Refuse what would be read as something else than rows, or could be read only once."""
    # Not only sequences: data sets of other libraries have a length and are read by number.
    if isinstance(data, str | bytes | Mapping) or not isinstance(data, Sized):
        raise DataError(
            f"{name} is {data!r:.60}; expected a list of demonstrations, texts or rows. Put a "
            "single one into a list, make a list of what a generator gives, and leave a list "
            "empty for no data. What a file has is read by load_data"
        )


def _encoded(
    data: Sequence[Example], parameters: SFTParameters, tokenizer: TokenizerWrapper | None
) -> list[Demonstration]:
    ready = [one for one in data if isinstance(one, Demonstration)]
    if len(ready) == len(data):
        return ready
    if ready:
        raise DataError(
            f"{len(ready)} of {len(data)} rows are demonstrations, and the others texts or rows; "
            "expected one kind: encode the others with Encoding"
        )
    placed = [(f"row {n}", _row(n, one)) for n, one in enumerate(data, start=1)]
    if tokenizer is None:
        raise ConfigError("the data has texts or rows; pass the tokenizer that they are read with")
    encoding = Encoding(tokenizer=tokenizer, max_length=parameters.max_length)
    found = encoding.encode(placed)
    if found.truncated or found.dropped:
        warnings.warn(
            f"of {len(data)} texts, {found.truncated} are longer than {parameters.max_length} "
            f"tokens and are cut there, and {found.dropped} more have no answer within that: split "
            "them before, or raise max_length",
            stacklevel=3,
        )
    return found.demonstrations


def _row(number: int, one: object) -> Mapping[str, Any]:
    if isinstance(one, str):
        return {"text": one}
    if not isinstance(one, Mapping):
        raise DataError(
            f"row {number} is {one!r:.60}; expected a Demonstration, a text, or a mapping with its "
            "columns"
        )
    return cast(Mapping[str, Any], one)


def _course(source: Epochs | BatchStream, parameters: SFTParameters) -> dict[str, Any]:
    """What decides the order of updates: a run is taken up only where all of it is the same."""
    names = ["batch_size", "accumulation", "packing", "seed"]
    course: dict[str, Any] = {name: getattr(parameters, name) for name in names}
    if isinstance(source, BatchStream):
        return course | {"data": "a stream"}
    content = blake2b(
        b"".join(map(demonstration_digest, source.demonstrations)), digest_size=16
    ).hexdigest()
    return course | {"data": content, "row": source.packed}
