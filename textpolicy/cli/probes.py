"""What else a bench measures: generation at other widths, products in other number formats."""

import statistics
import time
from collections.abc import Callable
from itertools import islice
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from textpolicy import fast_cpu
from textpolicy.adapters.quantization.stored_weights import format_of, weight_shape
from textpolicy.config.sections import RolloutOptions
from textpolicy.experiment.assembly import Experiment
from textpolicy.rewards.scorer import Scorer
from textpolicy.rollout.worker import collect
from textpolicy.types import Metrics, Task

_ROUNDS = 3
_REPEATS = 5
_FLOATS = {"float32": mx.float32, "bfloat16": mx.bfloat16}


def width_speeds(
    experiment: Experiment,
    scorer: Scorer,
    options: RolloutOptions,
    metrics: Metrics,
    seconds: float,
) -> dict[int, float]:
    """Tokens a second with half and twice as many tasks at once as a step has, by rows.

    They take turns for `seconds` at most. Empty if one turn of each would take longer, which the
    `metrics` of the steps foretell.
    """
    groups = options.groups_per_step
    sizes = [size for size in (groups // 2, groups, 2 * groups) if size]
    turn = metrics["time/generate"] * sum(sizes) / groups
    rounds = min(_ROUNDS, int(seconds / turn))
    tasks = experiment.environment.stream(0)
    found: dict[int, list[float]] = {size: [] for size in sizes}
    for number in range(rounds):
        for size, speeds in found.items():
            chosen = list(islice(tasks, size))
            speeds.append(_speed(experiment, scorer, chosen, options.group_size, number))
    return {
        size * options.group_size: statistics.median(speeds)
        for size, speeds in found.items()
        if speeds
    }


def _speed(
    experiment: Experiment, scorer: Scorer, tasks: list[Task], group_size: int, seed: int
) -> float:
    """Sampled tokens a second, rewards left out."""
    scored, started = scorer.seconds, time.perf_counter()
    groups = collect(tasks, experiment.policy, scorer, group_size=group_size, seed=seed)
    seconds = time.perf_counter() - started - (scorer.seconds - scored)
    return sum(sum(one.mask) for group in groups for one in group.rollouts) / seconds


def product_speeds(model: nn.Module, rows: int) -> dict[str, float]:
    """Milliseconds of the product with the largest matrix of a block, for so many rows: first as
    the model has it, then in floats. Small numbers are best of a few.
    """
    blocks = cast(list[nn.Module], cast(Any, model).layers)
    matrices = [m for _, m in blocks[-1].named_modules() if "weight" in m and m["weight"].ndim == 2]
    largest = max(matrices, key=lambda module: np.prod(weight_shape(module)))
    norms = [m["weight"].dtype for _, m in blocks[-1].named_modules() if _is_norm(m)]
    dtype = norms[0] if norms else mx.float32
    outputs, inputs = weight_shape(largest)
    form = format_of(largest)
    now = f"{form.bits}-bit {form.mode}" if form else _name_of(dtype)
    ways: dict[str, Callable[[], mx.array]] = {
        now: _product(largest, mx.random.normal((rows, inputs)).astype(dtype))
    }
    for name, other in _FLOATS.items():
        if name != now:
            layer = nn.Linear(inputs, outputs, bias=False)
            layer.set_dtype(other)
            ways[name] = _product(layer, mx.random.normal((rows, inputs)).astype(other))
    turns = [{name: _milliseconds(way) for name, way in ways.items()} for _ in range(_REPEATS)]
    return {name: min(turn[name] for turn in turns) for name in ways}


def blas_speeds() -> dict[str, float]:
    """Billions of operations a second: mlx on the CPU, and numpy where mlx's BLAS is a slow one.

    Empty where products are done elsewhere.
    """
    if mx.default_device().type != mx.cpu:
        return {}
    found = {"mlx": fast_cpu.measure_gflops()}
    if not fast_cpu.enable().fast:
        found["numpy"] = _numpy_gflops()
    return found


def _numpy_gflops(n: int = 1024) -> float:
    matrix = np.random.default_rng(0).normal(size=(n, n)).astype(np.float32)
    seconds: list[float] = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        np.matmul(matrix, matrix)
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / min(seconds) / 1e9


def _is_norm(module: nn.Module) -> bool:
    return "weight" in module and module["weight"].ndim == 1


def _name_of(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _product(layer: Any, x: mx.array) -> Callable[[], mx.array]:
    mx.eval(x, layer.parameters())
    return lambda: layer(x)


def _milliseconds(way: Callable[[], mx.array]) -> float:
    started = time.perf_counter()
    mx.eval(way())
    return 1e3 * (time.perf_counter() - started)
