"""`Rewards`: one or several reward functions with weights, a timeout and a policy for errors."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from textpolicy.errors import ConfigError
from textpolicy.rewards.reward_function import Reward, as_reward

OnError = str | float
"""What happens to a sample on which a reward fails: "fail", "skip", or a number as its reward."""


@dataclass(frozen=True)
class Rewards:
    """`Rewards([close, brief], weights=[1, 0.2], timeout=5, on_error="skip")`.

    Without `timeout` the functions run in this process. With `timeout` they run in up to `workers`
    other processes, and a call that takes more than `timeout` seconds is killed: seconds for one
    sample, or for the whole batch of a batched reward. `on_error` says what a failed call does:

        on_error="fail"   the error ends the run and names the function and the sample
        on_error="skip"   the sample is left out of its group, as if the reward had returned None
        on_error=-1.0     any number: the reward of this function for the sample

    With "skip" or a number, the run still ends once more than `max_error_rate` of the last 100
    calls have failed. No call is repeated. A sample that takes more than `slow` seconds is
    reported. On Linux, `memory_gb` limits the memory of each of the other processes, which then
    raise MemoryError.
    """

    functions: Callable[..., Any] | Sequence[Callable[..., Any]]
    _: KW_ONLY
    weights: Sequence[float] | None = None
    timeout: float | None = None
    on_error: OnError = "fail"
    max_error_rate: float = 0.2
    workers: int = min(4, os.cpu_count() or 1)
    slow: float = 5.0
    memory_gb: float | None = None

    def __post_init__(self) -> None:
        names = [member.name for member in self.members]
        _require(names, "there is no reward function", "at least one")
        twice = sorted({name for name in names if names.count(name) > 1})
        _require(
            not twice,
            f"two rewards are called {', '.join(twice)}",
            "different names; rename one of the rewards with @tp.reward(name=...)",
        )
        weights = self.member_weights
        _require(
            len(weights) == len(names) and all(map(math.isfinite, weights)),
            f"weights is {self.weights}",
            f"a finite number for each of {len(names)} rewards",
        )
        limit, policy, memory = self.timeout, self.on_error, self.memory_gb
        _require(limit is None or 0 < limit < math.inf, f"timeout is {limit}", "seconds above 0")
        known = policy in ("fail", "skip") if isinstance(policy, str) else math.isfinite(policy)
        _require(known, f"on_error is {policy!r}", '"fail", "skip" or a finite number')
        rate = self.max_error_rate
        _require(0 <= rate <= 1, f"max_error_rate is {rate}", "a number from 0 to 1")
        _require(self.workers >= 1, f"workers is {self.workers}", "at least 1")
        _require(memory is None or memory > 0, f"memory_gb is {memory}", "more than 0")
        _require(
            memory is None or limit,
            "memory_gb limits other processes, and without a timeout there are none",
            "a timeout beside memory_gb",
        )
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


def _require(condition: object, found: str, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{found}; expected {expected}")
