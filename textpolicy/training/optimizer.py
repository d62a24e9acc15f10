"""Adam with decoupled weight decay, its learning rate on one of mlx's schedules."""

import math
from collections.abc import Callable
from typing import Literal

import mlx.core as mx
import mlx.optimizers as optim

from textpolicy.errors import ConfigError

RateSchedule = Literal["constant", "linear", "cosine"]
LearningRate = float | Callable[[mx.array], mx.array]


def build_optimizer(
    learning_rate: float,
    *,
    schedule: RateSchedule = "constant",
    warmup: int = 0,
    updates: int | None = None,
    final_rate: float = 0.0,
    weight_decay: float = 0.0,
) -> optim.Optimizer:
    """An optimizer that warms up for `warmup` updates and decays to `final_rate` over the rest.

    Adam's bias correction is on: mlx leaves it off, which makes its first steps three times the
    rate. `updates` is the length of the whole run, needed where the rate decays.
    """
    _check(learning_rate, schedule, warmup, updates, weight_decay)
    _check_final(final_rate, schedule)
    rate = _decay(learning_rate, schedule, (updates or 0) - warmup, final_rate)
    if warmup:
        # From the first step above 0: a first update that moves nothing cannot be told from a bug.
        rise = optim.linear_schedule(learning_rate / (warmup + 1), learning_rate, warmup)
        rest = rate if callable(rate) else _constant(rate)
        rate = optim.join_schedules([rise, rest], [warmup])
    return optim.AdamW(rate, weight_decay=weight_decay, bias_correction=True)


def _decay(start: float, schedule: RateSchedule, steps: int, end: float) -> LearningRate:
    if schedule == "linear":
        return optim.linear_schedule(start, end, steps)
    if schedule == "cosine":
        return optim.cosine_decay(start, steps, end)
    if schedule == "constant":
        return start
    raise ConfigError(f"schedule is {schedule!r}; expected 'constant', 'linear' or 'cosine'")


def _constant(rate: float) -> Callable[[mx.array], mx.array]:
    return lambda step: mx.array(rate)


def _check(
    rate: float, schedule: RateSchedule, warmup: int, updates: int | None, weight_decay: float
) -> None:
    if not (math.isfinite(rate) and rate >= 0):
        raise ConfigError(f"learning_rate is {rate}; expected a number, 0 or more")
    if schedule != "constant" and updates is None:
        raise ConfigError(
            f"schedule {schedule!r} needs the number of updates in the whole run: pass updates="
        )
    if warmup < 0 or (updates is not None and warmup >= updates):
        raise ConfigError(
            f"warmup is {warmup} updates of {updates}; expected 0 or more, and fewer than all"
        )
    if not weight_decay >= 0:
        raise ConfigError(f"weight_decay is {weight_decay}; expected 0 or more")


def _check_final(rate: float, schedule: RateSchedule) -> None:
    if not (math.isfinite(rate) and rate >= 0):
        raise ConfigError(f"final_rate is {rate}; expected a number, 0 or more")
    if rate and schedule == "constant":
        raise ConfigError(
            f"the learning rate is to end at {rate}, and a constant one ends where it begins; "
            "choose the schedule 'linear' or 'cosine', or leave the final rate out"
        )
