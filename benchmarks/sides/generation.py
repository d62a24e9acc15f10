"""Generations of TextPolicy on the embedded model: their times, and a hash of what they draw.

`generation_versions.py` runs this file with the package of one checkout or another. It uses only
names that both have. Standard output has one line of JSON for each line that is read.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from textpolicy import fast_cpu
from textpolicy.environments import load
from textpolicy.generation.mlx_generation import load_model
from textpolicy.generation.policy import ModelPolicy
from textpolicy.rollout.worker import collect
from textpolicy.types import Sampling, Task

PROMPTS = ["12+34=", "Sort 9 8 7 6 5 4", "Say the alphabet backwards, please", "7*8="]
ROWS = 32


class SleepingEnv:
    """Four to seven turns of an environment that waits 50 ms in each step."""

    def __init__(self, number: int) -> None:
        self._prompt = "x" * (1 + number % 5)
        self._last = 4 + number % 4

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        self._turns = 0
        return self._prompt, {}

    def step(self, action: str, /) -> tuple[str, float, bool, bool, dict[str, Any]]:
        time.sleep(0.05)
        self._turns += 1
        return "r" * self._turns, 1.0, self._turns == self._last, False, {}

    def close(self) -> None:
        """Nothing is open."""

    def task(self) -> Task:
        """Return the task that an environment like this one plays."""
        return Task(id="sleeping", prompt=self._prompt, env=lambda: self)


class Generations:
    """What can be measured, by name. Each returns the tokens and log-probabilities that it drew."""

    def __init__(self, model: str) -> None:
        self._loaded = load_model(model)
        self._calculator = load("calculator")
        stream = self._calculator.tasks.stream(0)
        self._tasks = [next(stream) for _ in range(ROWS // 4)]
        self._sleeping_tasks = [SleepingEnv(number).task() for number in range(16)]
        self._sleeping_policy = ModelPolicy(*self._loaded, Sampling(max_tokens=12))

    def rows(self, tokens: int = 64, **options: Any) -> list[Any]:
        """Return 32 rows of four prompts."""
        sampling = Sampling(max_tokens=tokens, **options)
        policy = ModelPolicy(*self._loaded, sampling)
        groups = policy.generate(PROMPTS, n=ROWS // len(PROMPTS), seed=1)
        return [(one.tokens, one.logprobs) for group in groups for one in group]

    def stop(self) -> list[Any]:
        """Return the 32 rows with a stop string that no row has."""
        return self.rows(stop=("no answer has this text",))

    def penalty(self) -> list[Any]:
        """Return 32 rows with a repetition penalty."""
        return self.rows(repetition_penalty=1.3)

    def calculator(self) -> list[Any]:
        """Return 32 episodes with tools."""
        policy = ModelPolicy(*self._loaded, Sampling(max_tokens=self._calculator.max_tokens))
        return self._collect(self._tasks, 4, policy)

    def sleeping(self) -> list[Any]:
        """Return 16 episodes of the environment that waits."""
        return self._collect(self._sleeping_tasks, 1, self._sleeping_policy)

    def sleeping_alone(self) -> tuple[list[Any], float]:
        """Return each of the 16 episodes played alone, and the seconds of the slowest one."""
        rows: list[Any] = []
        slowest = 0.0
        for task in self._sleeping_tasks:
            started = time.perf_counter()
            rows += self._collect([task], 1, self._sleeping_policy)
            slowest = max(slowest, time.perf_counter() - started)
        return rows, slowest

    def _collect(self, tasks: list[Task], group_size: int, policy: ModelPolicy) -> list[Any]:
        groups = collect(tasks, policy, lambda completion: 1.0, group_size=group_size, seed=0)
        return [(one.tokens, one.logprobs) for group in groups for one in group.rollouts]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    model, threads = sys.argv[1:]
    if fast_cpu.enable().threads:
        fast_cpu.set_threads(int(threads))
    generations = Generations(model)
    for line in sys.stdin:
        run: Callable[[], Any] = getattr(generations, line.strip())
        started = time.perf_counter()
        rows = run()
        seconds = time.perf_counter() - started
        if isinstance(rows, tuple):
            rows, seconds = rows
        hashes = [
            hashlib.sha256(json.dumps(column).encode()).hexdigest()[:16]
            for column in zip(*rows, strict=True)
        ]
        print(json.dumps({"seconds": seconds, "hashes": hashes}), file=answers)


if __name__ == "__main__":
    main()
