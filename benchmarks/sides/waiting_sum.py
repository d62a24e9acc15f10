"""Sums of two numbers, answered in two turns; each call of the environment takes 50 ms.

A session of a remote environment is like this: it is opened, asked in each turn, and closed.
"""

import time
from typing import Any

import gymnasium as gym

SECONDS = 0.05
MAX_TOKENS = 6
MAX_TURNS = 2


class WaitingSum(gym.Env[str, str]):
    """Asks for the same sum twice; the second answer counts."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        time.sleep(SECONDS)
        a, b = self.np_random.integers(1000, size=2)
        self.sum, self.turns = str(a + b), 0
        return f"{a}+{b}=", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        time.sleep(SECONDS)
        self.turns += 1
        is_last = self.turns == MAX_TURNS
        return "again", float(is_last and action.strip() == self.sum), is_last, False, {}

    def close(self) -> None:
        time.sleep(SECONDS)
