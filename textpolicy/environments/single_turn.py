"""One question, one answer: a dataset and a reward as a Gymnasium environment."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from random import Random
from typing import Any

import gymnasium as gym
import numpy as np

from textpolicy.environments.space import AnyText
from textpolicy.rewards import Rewards, score
from textpolicy.types import Prompt, RewardFn

DrawFn = Callable[[Random], tuple[Prompt, Mapping[str, Any]]]
"""One task from a `random.Random`: the prompt, and the columns that the reward needs."""

GoldFn = Callable[[Mapping[str, Any]], str | list[str]]
"""The right answer to an example, or the right answer of each turn."""


class SingleTurnEnv(gym.Env[str, str]):
    """Ends after one answer, with its reward; the seed of `reset` decides the task.

    Training does not need it: tasks without an `env` are sampled in one wide batch. It is here for
    whoever wants the same task as an environment.
    """

    def __init__(
        self, draw: DrawFn, reward: RewardFn | Rewards, gold: GoldFn | None = None
    ) -> None:
        self.observation_space = AnyText()
        self.action_space = AnyText()
        self._draw = draw
        self._reward = reward
        self._gold = gold

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self._prompt, self._example = draw_task(self._draw, self.np_random)
        info = reset_info(self._prompt, self._example)
        if self._gold:
            info["gold"] = gold_for_turn(self._gold(self._example), 0)
        return prompt_text(self._prompt), info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        value = score(self._reward, prompt_text(self._prompt), action, self._example)
        return "", value or 0.0, True, False, {}


def draw_task(draw: DrawFn, rng: np.random.Generator) -> tuple[Prompt, Mapping[str, Any]]:
    """A task that the environment's generator decides."""
    return draw(Random(int(rng.integers(2**62))))


def reset_info(prompt: Prompt, example: Mapping[str, Any]) -> dict[str, Any]:
    """What `reset` reports: the example, and the messages if the prompt is more than one text."""
    info: dict[str, Any] = {"example": deepcopy(dict(example))}
    return info if isinstance(prompt, str) else info | {"messages": [dict(m) for m in prompt]}


def prompt_text(prompt: Prompt) -> str:
    """What a reward sees as the prompt: the string, or the last message's content."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def gold_for_turn(gold: str | list[str], turn: int) -> str:
    """The right answer in that turn, -1 for the last; after the last, the last again."""
    return gold if isinstance(gold, str) else gold[min(turn, len(gold) - 1)]
