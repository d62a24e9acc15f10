"""ChatEnv: an episode of several turns, in which a Python function writes the user's messages.

Also the types of the functions that make a task, and its prompt and gold answers as text.
"""

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

import gymnasium as gym

from textpolicy.environments.space import AnyText
from textpolicy.rewards import Rewards, score
from textpolicy.rewards.reward_function import own_copy
from textpolicy.types import Prompt, RewardFn

DrawFn = Callable[[Random], tuple[Prompt, Mapping[str, Any]]]
"""Draws one task: returns its prompt, and the columns that its reward function needs."""

GoldFn = Callable[[Mapping[str, Any]], str | list[str]]
"""Returns the gold answer to an example, or a list with the gold answer of each turn."""

ReplyFn = Callable[[Sequence[str], Mapping[str, Any]], str | None]
"""Takes all answers so far and the example; returns the next user message, or None to end."""

TurnRewardFn = Callable[[Sequence[str], Mapping[str, Any]], float]
"""Takes all answers so far and the example; returns the reward of the last answer alone."""


class ChatEnv(gym.Env[str, str]):
    """A conversation with `reply`. The seed of `reset` decides which task `draw` returns.

    Each answer earns its `turn_reward`. The episode terminates when `reply` returns None, and is
    truncated after `max_turns` answers. The last answer also earns `reward`.
    """

    def __init__(
        self,
        draw: DrawFn,
        reply: ReplyFn,
        reward: RewardFn | Rewards | None = None,
        *,
        turn_reward: TurnRewardFn | None = None,
        gold: GoldFn | None = None,
        max_turns: int = 8,
    ) -> None:
        self.observation_space = AnyText()
        self.action_space = AnyText()
        self._draw = draw
        self._reply = reply
        self._reward = reward
        self._turn_reward = turn_reward
        self._gold = gold
        self._max_turns = max_turns

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self._answers: list[str] = []
        prompt, example = self._draw(Random(int(self.np_random.integers(2**62))))
        # The functions of this episode may change the example, and other episodes share it.
        self._example = own_copy(example)
        self._prompt = prompt_text(prompt)
        info: dict[str, Any] = {"example": own_copy(dict(self._example))} | self._gold_info()
        if not isinstance(prompt, str):
            info["messages"] = [dict(message) for message in prompt]
        return self._prompt, info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._answers.append(action)
        reply = self._reply([*self._answers], self._example)
        terminated = reply is None
        truncated = not terminated and len(self._answers) >= self._max_turns
        value = self._turn_reward([*self._answers], self._example) if self._turn_reward else 0.0
        if self._reward and (terminated or truncated):
            value += score(self._reward, self._prompt, action, self._example) or 0.0
        return reply or "", value, terminated, truncated, self._gold_info()

    def _gold_info(self) -> dict[str, Any]:
        if self._gold is None:
            return {}
        return {"gold": gold_for_turn(self._gold(self._example), len(self._answers))}


def prompt_text(prompt: Prompt) -> str:
    """Return the prompt as one text for reward functions: the content of its last message."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def gold_for_turn(gold: str | list[str], turn: int) -> str:
    """Return the gold answer of a turn: the last one for turn -1 and for turns past the end."""
    return gold if isinstance(gold, str) else gold[min(turn, len(gold) - 1)]
