"""Several turns with a function on the other side: a game, a user, a teacher."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym

from textpolicy.environments.single_turn import (
    DrawFn,
    GoldFn,
    draw_task,
    gold_for_turn,
    prompt_text,
    reset_info,
)
from textpolicy.environments.space import AnyText
from textpolicy.rewards import Rewards, score
from textpolicy.types import RewardFn

ReplyFn = Callable[[Sequence[str], Mapping[str, Any]], str | None]
"""Given all answers so far and the example: the next user message, or None to end."""

TurnRewardFn = Callable[[Sequence[str], Mapping[str, Any]], float]
"""Given all answers so far and the example: what the last one earned by itself."""


class ChatEnv(gym.Env[str, str]):
    """What `reply` returns is the next user message; the seed of `reset` decides the task.

    Each turn earns its `turn_reward`. When `reply` returns None the episode is over, after
    `max_turns` it is truncated, and either way the last answer also earns `reward`.
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
        self._prompt, self._example = draw_task(self._draw, self.np_random)
        return prompt_text(self._prompt), reset_info(self._prompt, self._example) | self._info()

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._answers.append(action)
        reply = self._reply(self._answers, self._example)
        terminated = reply is None
        truncated = not terminated and len(self._answers) >= self._max_turns
        earned = self._turn_reward(self._answers, self._example) if self._turn_reward else 0.0
        if self._reward and (terminated or truncated):
            earned += score(self._reward, prompt_text(self._prompt), action, self._example) or 0.0
        return reply or "", earned, terminated, truncated, self._info()

    def _info(self) -> dict[str, Any]:
        if self._gold is None:
            return {}
        return {"gold": gold_for_turn(self._gold(self._example), len(self._answers))}
