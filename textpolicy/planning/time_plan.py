"""How long a run takes, estimated from the shapes of a model and the speed of one of its products.

Almost all time of a step goes into products of the model's matrices with the hidden states of
tokens. `measure_speeds` times a matrix of the model with as many rows as the phases of a step have,
and `plan_time` multiplies by the numbers of tokens and weights. The factors for everything else
were chosen by hand. docs/benchmarks.md has estimates of whole runs beside the times that they took.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from textpolicy.adapters.config.model_layout import read_model_layout
from textpolicy.adapters.quantization.stored_weights import float_dtype, weight_shape
from textpolicy.device_sizes import DeviceSizes

_SAMPLING, _TRAINING = 1.3, 1.5  # the time of a phase by that of its products
_LAYER_SECONDS = 4e-4  # of a block in a decode step, beside its products
_MEASURED_BYTES = 2**25  # of weights: more than the caches of a processor hold
_MEASURED_SECONDS = 0.1
_FAR_OFF, _LITTLE_SECONDS = 2.0, 10.0  # an estimate that is worth a correction


@dataclass(frozen=True, kw_only=True)
class ModelWork:
    """The weights that a token is multiplied by, in the blocks and in the output head."""

    blocks: int
    block_weights: int
    head_weights: int
    shares_prompts: bool
    """Whether training reads a prompt once for all rows of its group."""


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """The rows of a step and of a measurement, and the tokens of their prompts and completions."""

    groups: int
    group_size: int
    prompt: float
    completion: float
    held_out: int
    adapter_weights: int
    forwards: int = 0
    """Forward passes for log-probabilities beside those of the updates."""
    updates: int = 1
    checkpoint_gradients: bool = False


@dataclass(frozen=True, kw_only=True)
class TimePlan:
    """Estimated seconds of a step and of a measurement, and how many of each there are."""

    step: float
    evaluation: float
    steps: int
    evaluations: int
    beside: str = ""
    """What takes time that the estimate does not have, such as a judge."""

    @property
    def seconds(self) -> float:
        """The seconds of the whole run."""
        return self.steps * self.step + self.evaluations * self.evaluation

    def correction(self, measured: float, steps_left: int) -> str:
        """Return in words how long the rest takes if a step takes `measured` seconds.

        Return "" if the estimate is within a factor of 2, or if little time is left either way.
        """
        slower = measured > self.step
        far_off = measured > _FAR_OFF * self.step or _FAR_OFF * measured < self.step
        if not far_off or abs(measured - self.step) * steps_left < _LITTLE_SECONDS:
            return ""
        return (
            f"{'slower' if slower else 'faster'} than announced: a step takes "
            f"{_two_digits(measured)} s and not {_two_digits(self.step)} s, so about "
            f"{_in_words(steps_left * measured)} to go for the {steps_left:,} steps that are left"
        )

    def __str__(self) -> str:
        """Return the estimate in words, with as many digits as it deserves."""
        step, evaluation = _two_digits(self.step), _two_digits(self.evaluation)
        return (
            f"about {_in_words(self.seconds)}: {self.steps:,} steps of {step} s and "
            f"{self.evaluations} measurements of {evaluation} s, by an estimate"
            + (f" without the time of {self.beside}" if self.beside else "")
        )


def _two_digits(number: float) -> str:
    """Return a number as 220, 3.1 or 0.042."""
    return f"{float(f'{number:.2g}'):g}"


Speeds = Mapping[int, float]
"""Seconds of one weight times one token, by the number of tokens that are multiplied at once."""


def work_of(model: nn.Module, architecture: Mapping[str, Any]) -> ModelWork:
    """Return what a token is multiplied by in this model, which need not be loaded."""
    modules, layout = dict(model.named_modules()), read_model_layout(model)
    head = embedding = inside = 0
    chosen = int(architecture.get("num_experts_per_tok") or 1)
    for path, one in layout.adaptable.items():
        shape = weight_shape(modules[path])
        weights = chosen * prod(shape[1:]) if len(shape) > 2 else prod(shape)
        if one.block is not None:
            inside += weights
        elif one.kind == "embedding":
            embedding = max(embedding, weights)
        else:
            head = max(head, weights)
    return ModelWork(
        blocks=len(layout.blocks or ()),
        block_weights=inside,
        head_weights=head or embedding,
        shares_prompts=all(type(layer) is KVCache for layer in make_prompt_cache(model)),
    )


def measure_speeds(model: nn.Module, rows: Sequence[int]) -> Speeds:
    """Return the speed of the largest matrix of a block with these numbers of rows.

    Of a model that is not loaded, only the measured matrices are computed.
    """
    layout, modules = read_model_layout(model), dict(model.named_modules())
    linear = [one for one in layout.adaptable.values() if one.block is not None]
    linear = [one for one in linear if len(weight_shape(modules[one.path])) == 2]
    largest = max(linear, key=lambda one: prod(weight_shape(modules[one.path])))
    layers = [modules[one.path] for one in linear if one.key == largest.key]
    shape = weight_shape(layers[0])
    layers = layers[: ceil(_MEASURED_BYTES / layers[0]["weight"].nbytes)]
    mx.eval([layer.parameters() for layer in layers])
    dtype = float_dtype(layers[0])
    return {count: _measure(layers, shape, count, dtype) for count in rows}


def _measure(
    layers: Sequence[nn.Module], shape: Sequence[int], rows: int, dtype: mx.Dtype
) -> float:
    inputs = mx.ones((rows, shape[1]), dtype)
    seconds: list[float] = []
    # The first product prepares what the others find ready.
    while len(seconds) < 3 or (sum(seconds) < _MEASURED_SECONDS and len(seconds) < 20):
        started = time.perf_counter()
        mx.eval([layer(inputs) for layer in layers])
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:]) / (rows * len(layers) * prod(shape))


def _in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"


def rows_to_measure(work: StepWork, sizes: DeviceSizes) -> tuple[int, int, int]:
    """Return the rows of a product in sampling, in a measurement, and over whole prompts."""
    most = sizes.decoding_rows
    sampled = min(work.groups * work.group_size, most)
    return sampled, min(work.held_out, most), sizes.micro_batch_tokens


def plan_time(
    model: ModelWork,
    work: StepWork,
    speeds: Speeds,
    sizes: DeviceSizes,
    *,
    steps: int,
    evaluations: int,
) -> TimePlan:
    """Return the estimated time of a run on the machine whose speeds were measured."""
    sampled, measured, many = rows_to_measure(work, sizes)
    rows = work.groups * work.group_size

    def answers(prompts: int, rows: int, at_once: int) -> float:
        read = prompts * work.prompt * model.block_weights * speeds[many]
        weights = model.block_weights + model.head_weights
        written = rows * work.completion * weights * speeds[at_once]
        waves = ceil(rows / sizes.decoding_rows)
        beside = waves * work.completion * model.blocks * _LAYER_SECONDS
        return _SAMPLING * (read + written) + beside

    prompts = work.groups if model.shares_prompts else rows
    tokens = prompts * work.prompt + rows * work.completion
    forward = tokens * model.block_weights + rows * work.completion * model.head_weights
    # The gradient passes through frozen matrices, and takes two more products with adapters.
    passes = work.forwards + work.updates * (3 if work.checkpoint_gradients else 2)
    products = passes * forward + work.updates * 3 * tokens * work.adapter_weights
    return TimePlan(
        step=answers(work.groups, rows, sampled) + _TRAINING * products * speeds[many],
        evaluation=answers(work.held_out, work.held_out, measured),
        steps=steps,
        evaluations=evaluations,
    )
