"""One reward, or several with weights, and how they are to run: a record; the scorer acts on it."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from textpolicy.errors import ConfigError
from textpolicy.rewards.reward_function import Reward, as_reward
from textpolicy.rewards.signature import read_signature

OnError = str | float
"""What is done about a reward that fails: "fail", "skip", or a number to score instead."""


@dataclass(frozen=True)
class Rewards:
    """`Rewards([close, brief], weights=[1, 0.2], timeout=5, on_error="skip")`.

    Without `timeout` the functions run in this process. With it they run in up to `workers` other
    processes, where a call that takes more than `timeout` seconds is killed: seconds for one
    sample, or for the whole batch of a batched reward. What a failing function does to the run:

        on_error="fail"   the run ends with the error, which names function and sample
        on_error="skip"   the sample is left out of its group, as if the reward had returned None
        on_error=-1.0     any number: what that function's reward is then

    With the latter two a run still ends once more than `max_error_rate` of the last 100 calls have
    failed. Nothing is tried twice. A sample that takes more than `slow` seconds is reported. With
    `memory_gb` each of the other processes gets a MemoryError beyond so much (Linux).
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
        names = [reward.name for reward in self.members]
        twice = {name for name in names if names.count(name) > 1}
        _require(names, "at least one reward function", "none")
        _require(
            not twice,
            "names that differ; give one another with @tp.reward(name=...)",
            f"two rewards called {', '.join(sorted(twice))}",
        )
        weights = self.shares
        _require(
            len(weights) == len(names) and all(map(math.isfinite, weights)),
            f"a finite number for each of {len(names)} rewards",
            f"weights {self.weights}",
        )
        limit = self.timeout
        _require(limit is None or 0 < limit < math.inf, "seconds above 0", f"timeout {limit}")
        policy = self.on_error
        fine = policy in ("fail", "skip") if isinstance(policy, str) else math.isfinite(policy)
        _require(fine, '"fail", "skip" or a finite number', f"on_error {policy!r}")
        _require(0 <= self.max_error_rate <= 1, "0 to 1", f"max_error_rate {self.max_error_rate}")
        _require(self.workers >= 1, "at least 1", f"workers {self.workers}")
        memory = self.memory_gb
        _require(memory is None or memory > 0, "more than 0", f"memory_gb {memory}")
        _require(memory is None or limit, "a timeout with memory_gb", "no other processes to limit")
        for reward in self.members:
            read_signature(reward)

    @property
    def members(self) -> tuple[Reward, ...]:
        """The functions as records, in order."""
        given = self.functions
        several = isinstance(given, Sequence)
        return tuple(as_reward(function) for function in (given if several else [given]))

    @property
    def shares(self) -> tuple[float, ...]:
        """Their weights: 1 where none are given."""
        return tuple(self.weights) if self.weights is not None else (1.0,) * len(self.members)


def as_rewards(reward: Callable[..., Any] | Rewards) -> Rewards:
    """A function alone is one reward, run in this process, whose errors end the run."""
    return reward if isinstance(reward, Rewards) else Rewards(reward)


def _require(condition: object, expected: str, got: str) -> None:
    if not condition:
        raise ConfigError(f"rewards have {got}; expected {expected}")
