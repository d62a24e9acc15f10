"""AdamW, with a schedule of its learning rate."""

import math
import warnings
from collections.abc import Callable
from typing import Literal

import mlx.core as mx
import mlx.optimizers as optim

from textpolicy.errors import ConfigError

RateSchedule = Literal["constant", "linear", "cosine"]
_AT_LEAST_0 = "expected a number, 0 or more"
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
    """Return AdamW that warms up for `warmup` updates, then decays to `final_rate`.

    A warm-up as long as the run leaves nothing to decay: the rate rises to the end, with a warning.

    `updates` is the number of updates in the whole run; "linear" and "cosine" need it. Adam's bias
    correction is on. By default, mlx has it off, which makes the first steps three times as long.
    """
    for wrong, message in (
        (not 0 <= learning_rate < math.inf, f"learning_rate is {learning_rate}; {_AT_LEAST_0}"),
        (not 0 <= final_rate < math.inf, f"final_rate is {final_rate}; {_AT_LEAST_0}"),
        (not weight_decay >= 0, f"weight_decay is {weight_decay}; {_AT_LEAST_0}"),
        (
            schedule != "constant" and updates is None,
            f"schedule {schedule!r} needs the number of updates in the whole run. Pass updates=",
        ),
        (warmup < 0, f"warmup is {warmup} updates; expected 0 or more"),
        (
            final_rate > 0 and schedule == "constant",
            f"final_rate is {final_rate}, and a constant learning rate does not decay. Choose the "
            "schedule 'linear' or 'cosine', or leave out the final rate",
        ),
    ):
        if wrong:
            raise ConfigError(message)
    if warmup and updates is not None and warmup >= updates:
        warnings.warn(
            f"warmup is {warmup} updates, and the run has {updates}: the learning rate rises to "
            f"the end and reaches {updates / (warmup + 1):.0%} of {learning_rate:g}. For the whole "
            f"rate, set fewer updates of warm-up, such as {max(1, updates // 10)}",
            stacklevel=2,
        )
        schedule = "constant"
    rate = _decaying_rate(learning_rate, schedule, (updates or 0) - warmup, final_rate)
    if warmup:
        # The first rate is above 0, because a first update that moves nothing is an error.
        rise = optim.linear_schedule(learning_rate / (warmup + 1), learning_rate, warmup)
        rest = rate if callable(rate) else lambda step: mx.array(learning_rate)
        rate = optim.join_schedules([rise, rest], [warmup])
    return optim.AdamW(rate, weight_decay=weight_decay, bias_correction=True)


def _decaying_rate(start: float, schedule: RateSchedule, steps: int, end: float) -> LearningRate:
    if schedule == "linear":
        return optim.linear_schedule(start, end, steps)
    if schedule == "cosine":
        return optim.cosine_decay(start, steps, end)
    if schedule == "constant":
        return start
    raise ConfigError(f"schedule is {schedule!r}; expected 'constant', 'linear' or 'cosine'")
