"""Supervised fine-tuning: raise the log-probability of demonstrated tokens.

The loss counts the tokens of answers and their stop tokens, never the prompt or the padding. All
trainable weights of the model are trained: its adapters, or every weight.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from random import Random
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from textpolicy import fast_cpu
from textpolicy.activity import doing
from textpolicy.adapters.container import AdapterContainer
from textpolicy.adapters.files.adapter_file import prepare_adapter_path
from textpolicy.errors import ConfigError, TrainingError
from textpolicy.fast_cpu.bfloat16_copies import keep_copies
from textpolicy.machine import keep_memory_in_bounds, most_copied_bytes
from textpolicy.tracking.best import BestAdapter
from textpolicy.training.checkpoint import (
    Checkpoint,
    Checkpoints,
    check_base,
    random_states,
    restore_random_states,
    restore_training_tensors,
    training_tensors,
)
from textpolicy.training.gradient_accumulation import accumulate_gradient
from textpolicy.training.sft.batches import (
    BatchStream,
    PackedRow,
    batches_by_length,
    make_sft_batch,
)
from textpolicy.training.sft.demonstrations import Demonstration
from textpolicy.training.sft.examples import (
    Example,
    check_data_order,
    check_examples,
    data_order,
    encode_examples,
    epochs_of,
)
from textpolicy.training.sft.loss import BatchLoss, SFTLoss, in_mode, make_batch_loss
from textpolicy.training.sft.packing import check_packable
from textpolicy.training.sft.parameters import (
    SaveReport,
    SFTEvent,
    SFTParameters,
    TrainReport,
    ValidationReport,
)
from textpolicy.training.trainer_checks import check_differentiable
from textpolicy.types import Progress, asks_to_stop

SFTEnd = Literal["finished", "stopped", "early"]
_FACT = "supervised"


@dataclass(frozen=True, kw_only=True)
class SFTResult:
    """`iteration` updates are finished. `ended` is "stopped" by a callback, "early" for patience.

    `first_loss` was measured when training began. `validation_loss` is None if the last update was
    not followed by a validation. `best_iteration` had the lowest validation loss; its adapters are
    in the parameters' best file.
    """

    iteration: int
    ended: SFTEnd
    first_loss: float | None
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
    checkpoints: Checkpoints | None = None,
    resume: Checkpoint | None = None,
    on_progress: Callable[[SFTEvent], Progress | None] | None = None,
    on_update: Callable[[int], Progress | None] | None = None,
) -> SFTResult:
    """Update the trainable weights until all iterations are done or a callback returns STOP.

    Data is a list, or another collection with a length that can be read more than once.
    Validation happens before the first update, every `steps_per_eval` updates and after the last.
    However training ends, the adapters are saved to `adapter_path` and the state to `checkpoints`,
    where these are given. `resume` is one of these checkpoints, for example
    `checkpoints.newest()`: training continues to the same numbers, given the same model, data and
    settings. `on_update` is called after each update with the number of finished updates.
    """
    fast_cpu.enable()
    # Last digits depend on the copies, which an evaluation would make in the middle of the run.
    keep_copies(model, most_copied_bytes())
    parameters = parameters or SFTParameters()
    if not tree_flatten(model.trainable_parameters()):
        raise TrainingError("the model has no trainable weights: attach adapters or unfreeze it")
    if not isinstance(train, BatchStream):
        check_examples("train", train)
    check_examples("validate", validate)
    source = train if isinstance(train, BatchStream) else epochs_of(train, parameters, tokenizer)
    with in_mode(model, training=False):
        check_differentiable(model)
        if parameters.packing:
            check_packable(model)
    validation = encode_examples(validate, parameters, tokenizer)
    if parameters.patience and not validation:
        raise ConfigError(
            f"patience is {parameters.patience}, and there is no validation data. Give validation "
            "data, or leave out patience"
        )
    run = _Run(
        model=model,
        optimizer=optimizer,
        parameters=parameters,
        validation=validation,
        loss=make_batch_loss(model, loss),
        data_order=data_order(source, parameters),
        checkpoints=checkpoints,
        on_update=on_update,
    )
    if resume is not None:
        run.restore(resume)
    with in_mode(model, training=True), keep_memory_in_bounds():
        for event in run.events(source.updates(run.iteration)):
            if on_progress is not None and asks_to_stop(on_progress(event), "on_progress"):
                run.ended = "stopped"
                break
    # A callback may have stopped the run before its last files were written.
    for _ in run.save_rest():
        pass
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
    """Return the mean loss over the learned tokens of the data, or of `batches` batches of it."""
    parameters = SFTParameters(
        batch_size=batch_size, validation_batches=batches, max_length=max_length
    )
    check_examples("data", data)
    demonstrations = encode_examples(data, parameters, tokenizer)
    if not demonstrations:
        raise TrainingError("there are no demonstrations to evaluate on")
    return _evaluate(model, demonstrations, make_batch_loss(model, loss), parameters)


def iterations_of(
    epochs: int, demonstrations: Sequence[Demonstration], parameters: SFTParameters
) -> int:
    """Return the number of updates that `epochs` epochs of the data take."""
    source = epochs_of(demonstrations, parameters, None)
    return sum(len(source.epoch(number)) for number in range(epochs))


@dataclass(kw_only=True)
class _ReportWindow:
    """Sums since the last report; updates, tokens and seconds with a clock are of this process."""

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


@dataclass(kw_only=True)
class _ValidationHistory:
    """The first, last and best validation, and how many in a row were not better."""

    first: float | None = None
    last: float | None = None
    last_iteration: int | None = None
    best: float | None = None
    best_iteration: int | None = None
    worse: int = 0

    def add(self, loss: float, iteration: int) -> None:
        self.first = loss if self.first is None else self.first
        self.last, self.last_iteration = loss, iteration
        self.worse += 1
        if self.best is None or loss < self.best:
            self.best, self.best_iteration, self.worse = loss, iteration, 0


@dataclass(kw_only=True)
class _Run:
    """One call of `train_sft`: its events in order, and the state between them."""

    model: nn.Module
    optimizer: Optimizer
    parameters: SFTParameters
    validation: Sequence[Demonstration]
    loss: BatchLoss
    data_order: Mapping[str, Any]
    checkpoints: Checkpoints | None
    on_update: Callable[[int], Progress | None] | None
    ended: SFTEnd = "finished"
    window: _ReportWindow = field(default_factory=_ReportWindow)
    validated: _ValidationHistory = field(default_factory=_ValidationHistory)
    saved: int | None = None
    checkpointed: int | None = None

    def __post_init__(self) -> None:
        self.iteration = self.parameters.completed_iterations
        self.adapters = AdapterContainer.of(self.model)
        self._checked = False
        self._best: BestAdapter | None = None
        best_file = self.parameters.best_file
        if self.adapters and best_file and self.validation:
            self._best = BestAdapter(self.adapters, best_file)
        if self.parameters.adapter_file is None:
            return
        prepare_adapter_path(self.parameters.adapter_file)
        if self.adapters is None:
            raise ConfigError(
                f"adapter_path is {self.parameters.adapter_path}, and the model has no adapters to "
                "save. Attach adapters, or leave out adapter_path and save the weights after "
                "training"
            )

    def events(self, updates: Iterator[Sequence[PackedRow]]) -> Generator[SFTEvent]:
        """Train and yield each event; the run stops when the caller stops iterating."""
        yield from self._due()
        for rows in islice(updates, self.parameters.iterations - self.iteration):
            patience = self.parameters.patience
            if patience is not None and self.validated.worse >= patience:
                self.ended = "early"
                break
            self._update(rows)
            if self.on_update and asks_to_stop(self.on_update(self.iteration), "on_update"):
                self.ended = "stopped"
                return
            yield from self._due()
        if self.window.timed_updates:
            yield self._report()
        if self.validation and self.validated.last_iteration != self.iteration:
            yield self._validate()
        yield from self.save_rest()

    def _due(self) -> Generator[SFTEvent]:
        """Yield the events that are due at this iteration and have not happened."""
        now, parameters, validated = self.iteration, self.parameters, self.validated
        falls = now % parameters.steps_per_report == 0 or now == parameters.iterations
        if falls and self.window.timed_updates:
            yield self._report()
        falls = now % parameters.steps_per_eval == 0 or validated.last is None
        if self.validation and falls and validated.last_iteration != now:
            yield self._validate()
        if self.checkpoints and now > 0 and self.checkpoints.due(now):
            self._save_checkpoint()
        falls = now % parameters.save_every == 0 and now > 0
        if parameters.adapter_file and falls and self.saved != now:
            yield self._save_adapters()

    def save_rest(self) -> Generator[SFTEvent]:
        """Save what is not saved yet, and yield the event of the adapters."""
        self._save_checkpoint()
        if self.parameters.adapter_file and self.saved != self.iteration:
            yield self._save_adapters()

    def result(self) -> SFTResult:
        validated = self.validated
        return SFTResult(
            iteration=self.iteration,
            ended=self.ended,
            first_loss=validated.first,
            validation_loss=validated.last if validated.last_iteration == self.iteration else None,
            best_loss=validated.best,
            best_iteration=validated.best_iteration,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore the state of the run that saved the checkpoint; change nothing if it differs."""
        given = self.parameters.completed_iterations
        if given not in (0, checkpoint.step):
            raise ConfigError(
                f"completed_iterations is {given}, and the checkpoint was saved after "
                f"{checkpoint.step} iterations. Leave out completed_iterations with a checkpoint"
            )
        if self.parameters.iterations < checkpoint.step:
            raise ConfigError(
                f"the run has {checkpoint.step} updates already, and iterations is "
                f"{self.parameters.iterations}; expected at least as many. Give more iterations, "
                "or leave them out"
            )
        if _FACT not in checkpoint.facts:
            raise TrainingError(
                "the checkpoint is of a run of reinforcement learning. Resume it with train_rl or "
                "`textpolicy train --resume`"
            )
        progress: dict[str, Any] = checkpoint.facts[_FACT]
        check_data_order(progress["data_order"], self.data_order)
        check_base(progress["base"], self.adapters.fingerprint if self.adapters else None)
        restore_training_tensors(checkpoint.arrays, self.model, self.optimizer)
        restore_random_states(checkpoint.facts["random"])
        self.iteration = self.checkpointed = checkpoint.step
        self.window = _ReportWindow(**progress["window"])
        self.validated = _ValidationHistory(**progress["validated"])
        if self.adapters:
            self.adapters.version = progress["version"]
        if self._best and progress["best"]:
            self._best.restore(progress["best"])
        self._checked = self.iteration > 0

    @doing("training", begins=True)
    def _update(self, rows: Sequence[PackedRow]) -> None:
        started = time.perf_counter()
        loss, tokens, gradient = self._gradient(rows)
        arrays = cast(list[tuple[str, mx.array]], tree_flatten(gradient))
        magnitudes = [mx.abs(array).max().astype(mx.float32) for _, array in arrays]
        size = float(mx.stack(magnitudes).max())
        _check_finite(self.iteration, "loss", loss)
        _check_finite(self.iteration, "gradient", size)
        if size == 0 and not self._checked:
            raise TrainingError(
                "the gradient of the first update is exactly zero, so the loss does not depend on "
                "the trainable weights. Compute the loss from the output of the model"
            )
        self._checked = True
        self.optimizer.update(self.model, gradient)
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        if self.adapters:
            self.adapters.advance()
        self.iteration += 1
        self.window.add(loss, tokens, time.perf_counter() - started)

    def _gradient(self, rows: Sequence[PackedRow]) -> tuple[float, int, Any]:
        """Return mean loss, learned tokens and gradient, with one batch in memory at a time."""
        size = self.parameters.batch_size
        parts = [rows[at : at + size] for at in range(0, len(rows), size)]
        gradient, values = accumulate_gradient(
            self.model,
            lambda part: self.loss(make_sft_batch(part)),
            parts,
            checkpoint=self.parameters.checkpoint_gradients,
            weight=lambda value: value[1],
        )
        counts = [int(tokens) for _, tokens in values]
        _check_counted(sum(counts))
        total = sum(float(loss) * count for (loss, _), count in zip(values, counts, strict=True))
        return total / sum(counts), sum(counts), gradient

    def _report(self) -> TrainReport:
        window, self.window = self.window, _ReportWindow()
        return TrainReport(
            iteration=self.iteration,
            loss=window.loss / window.tokens,
            iterations_per_second=window.timed_updates / window.seconds,
            tokens_per_second=window.timed_tokens / window.seconds,
            learning_rate=float(self.optimizer.learning_rate),
        )

    def _validate(self) -> ValidationReport:
        started = time.perf_counter()
        loss = _evaluate(self.model, self.validation, self.loss, self.parameters)
        _check_finite(self.iteration, "validation loss", loss)
        self.validated.add(loss, self.iteration)
        if self._best:
            self._best.record_evaluation(-loss)
        seconds = time.perf_counter() - started
        return ValidationReport(iteration=self.iteration, loss=loss, seconds=seconds)

    def _save_adapters(self) -> SaveReport:
        path = self.parameters.adapter_file
        assert path and self.adapters
        self.adapters.publish(path)
        self.saved = self.iteration
        return SaveReport(iteration=self.iteration, path=path)

    def _save_checkpoint(self) -> None:
        if self.checkpoints is None or self.checkpointed == self.iteration:
            return
        # The seconds of this process mean nothing to the process that resumes.
        unmeasured = {"timed_updates": 0, "timed_tokens": 0, "seconds": 0.0}
        progress = {
            "data_order": self.data_order,
            "base": self.adapters.fingerprint if self.adapters else None,
            "version": self.adapters.version if self.adapters else 0,
            "window": asdict(self.window) | unmeasured,
            "validated": asdict(self.validated),
            "best": self._best.state() if self._best else None,
        }
        arrays = training_tensors(self.model, self.optimizer)
        facts = {_FACT: progress, "random": random_states()}
        self.checkpoints.save(Checkpoint(step=self.iteration, arrays=arrays, facts=facts))
        self.checkpointed = self.iteration


def _evaluate(
    model: nn.Module,
    demonstrations: Sequence[Demonstration],
    loss: BatchLoss,
    parameters: SFTParameters,
) -> float:
    size, count = parameters.batch_size, parameters.validation_batches
    if count:
        # A fixed shuffle, because data is often sorted.
        number = min(count * size, len(demonstrations))
        demonstrations = Random(0).sample(demonstrations, number)
    total, tokens = 0.0, 0
    batches = batches_by_length(demonstrations, size)
    with doing("validating", len(batches), begins=True) as activity, in_mode(model, training=False):
        for rows in batches:
            mean, counted = loss(make_sft_batch(rows))
            total += float(mean) * int(counted)
            tokens += int(counted)
            activity.advance()
    _check_counted(tokens)
    return total / tokens


def _check_counted(tokens: int) -> None:
    if tokens < 1:
        raise TrainingError(
            f"the loss reports a mean over {tokens} tokens; at least 1 is expected. Return the "
            "number of targets that the mean is taken over, such as mask.sum()"
        )


def _check_finite(iteration: int, what: str, value: float) -> None:
    # Checked before anything is updated or saved, so that the last save can still be resumed.
    if not math.isfinite(value):
        raise TrainingError(
            f"the {what} is {value} after {iteration} iterations. Lower the learning rate, or "
            "compute in float32. The files saved before are unchanged"
        )
