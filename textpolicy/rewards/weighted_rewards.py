"""`Rewards`: reward functions with weights, a timeout and a policy for errors."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from textpolicy.errors import ConfigError
from textpolicy.rewards.returned_numbers import MAX_REWARD
from textpolicy.rewards.reward_function import Reward, as_reward

_MAX_WEIGHT = 1e6


@dataclass(frozen=True)
class Rewards:
    """Reward functions and how they run: `Rewards([close, brief], weights=[1, 0.2], timeout=5)`.

    Without `timeout` the functions run in this process. With `timeout` they run in up to `workers`
    other processes, and a call that takes more than `timeout` seconds is killed: seconds for one
    sample, or for the whole batch of a batched reward. `on_error` says what a failed call does:

        on_error="fail"   the error ends the run and names the function and the sample
        on_error="skip"   the sample is left out of its group, as if the reward had returned None
        on_error=-1.0     any number: the reward of this function for the sample

    With "skip" or a number, the run still ends once more than `max_error_rate` of the last 100
    calls have failed, where each sample of a batch counts. No call is repeated. A sample that takes
    more than `slow` seconds is reported. On Linux, `memory_gb` limits the memory of each of the
    other processes, which then raise MemoryError.
    """

    functions: Callable[..., Any] | Sequence[Callable[..., Any]]
    _: KW_ONLY
    weights: Sequence[float] | None = None
    timeout: float | None = None
    on_error: str | float = "fail"
    max_error_rate: float = 0.2
    workers: int = min(4, os.cpu_count() or 1)
    slow: float = 5.0
    memory_gb: float | None = None

    def __post_init__(self) -> None:
        names = [member.name for member in self.members]
        twice = ", ".join(sorted({name for name in names if names.count(name) > 1}))
        weights, timeout, memory = self.member_weights, self.timeout, self.memory_gb
        fit = len(weights) == len(names) and all(abs(w) <= _MAX_WEIGHT for w in weights)
        policy, rate = self.on_error, self.max_error_rate
        known = policy in ("fail", "skip")
        if isinstance(policy, int | float):
            known = abs(policy) <= MAX_REWARD
        each = f"a finite number for each of {len(names)} rewards, at most {_MAX_WEIGHT:g}"
        rename = "different names; rename one with @tp.reward(name=...)"
        rules: list[tuple[object, str, str]] = [
            (names, "there is no reward function", "at least one"),
            (not twice, f"two rewards are called {twice}", rename),
            (fit, f"weights is {self.weights}", each),
            (timeout is None or 0 < timeout < math.inf, f"timeout is {timeout}", "seconds above 0"),
            (known, f"on_error is {policy!r}", '"fail", "skip" or a finite number to 1e12'),
            (0 <= rate <= 1, f"max_error_rate is {rate}", "a number from 0 to 1"),
            (self.workers >= 1, f"workers is {self.workers}", "at least 1"),
            (memory is None or memory > 0, f"memory_gb is {memory}", "more than 0"),
            (memory is None or timeout, "memory_gb is set without a timeout", "a timeout too"),
        ]
        for holds, found, expected in rules:
            if not holds:
                raise ConfigError(f"{found}; expected {expected}")
        for member in self.members:
            _ = member.parameters  # Raises for a function that would not see the completion.

    @property
    def members(self) -> tuple[Reward, ...]:
        """The functions as `Reward`s, in order."""
        given = self.functions
        several = isinstance(given, Sequence)
        return tuple(as_reward(function) for function in (given if several else [given]))

    @property
    def member_weights(self) -> tuple[float, ...]:
        """The weights of the functions, in order; 1 for each if no weights are given."""
        return tuple(self.weights) if self.weights is not None else (1.0,) * len(self.members)


def as_rewards(reward: Callable[..., Any] | Rewards) -> Rewards:
    """Return `Rewards`; a single function runs in this process, and its errors end the run."""
    return reward if isinstance(reward, Rewards) else Rewards(reward)
