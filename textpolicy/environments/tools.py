"""Tool use: the model calls Python functions and reads what they return, until it answers."""

import json
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import gymnasium as gym

from textpolicy.environments.chat import TurnRewardFn
from textpolicy.environments.faults import call_tool
from textpolicy.environments.single_turn import (
    DrawFn,
    GoldFn,
    draw_task,
    gold_for_turn,
    prompt_text,
    reset_info,
)
from textpolicy.environments.space import AnyText
from textpolicy.environments.tool_calls import (
    MAX_CALLS_PER_ANSWER,
    ParseCalls,
    Tool,
    ToolCall,
    check_arguments,
    parse_tagged_calls,
    tool_schema,
)
from textpolicy.rewards import Rewards, score
from textpolicy.types import Message, RewardFn

_MAX_OUTPUT_CHARACTERS = 4000


class ToolEnv(gym.Env[str, str]):
    """An answer with calls is answered by one tool message for each; one without ends the episode.

    A call that cannot be made, or a tool that raises, is answered by the error. `info["metrics"]`
    counts calls and errors. Rewards are those of `ChatEnv`.
    """

    def __init__(
        self,
        draw: DrawFn,
        tools: Sequence[Tool],
        reward: RewardFn | Rewards | None = None,
        *,
        parse: ParseCalls = parse_tagged_calls,
        turn_reward: TurnRewardFn | None = None,
        gold: GoldFn | None = None,
        max_turns: int = 8,
    ) -> None:
        self.observation_space = AnyText()
        self.action_space = AnyText()
        self.tools = {tool.__name__: tool for tool in tools}
        self.schemas = [tool_schema(tool) for tool in tools]
        self._draw = draw
        self._reward = reward
        self._parse = parse
        self._turn_reward = turn_reward
        self._gold = gold
        self._max_turns = max_turns

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self._answers: list[str] = []
        self._calls = self._errors = 0
        self._prompt, self._example = draw_task(self._draw, self.np_random)
        info = reset_info(self._prompt, self._example) | {"tools": deepcopy(self.schemas)}
        return prompt_text(self._prompt), info | self._info()

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._answers.append(action)
        calls = self._parse(action, self.tools)
        outputs = [self._answer(call) for call in calls[:MAX_CALLS_PER_ANSWER]]
        truncated = bool(calls) and len(self._answers) >= self._max_turns
        earned = self._turn_reward(self._answers, self._example) if self._turn_reward else 0.0
        if self._reward and (truncated or not calls):
            earned += score(self._reward, prompt_text(self._prompt), action, self._example) or 0.0
        messages = [{"role": "tool", "content": output} for output in outputs]
        info = self._info() | {"messages": messages}
        return "\n".join(outputs), earned, not calls, truncated, info

    def _answer(self, call: ToolCall) -> str:
        self._calls += 1
        if wrong := check_arguments(call, self.tools):
            self._errors += 1
            return f"error: {wrong}"
        output, returned = call_tool(self.tools[call.name], call.arguments)
        self._errors += not returned
        if len(output) > _MAX_OUTPUT_CHARACTERS:
            return f"{output[:_MAX_OUTPUT_CHARACTERS]}… ({len(output)} characters, cut)"
        return output

    def _info(self) -> dict[str, Any]:
        metrics = {"tool_calls": float(self._calls), "tool_errors": float(self._errors)}
        info: dict[str, Any] = {"metrics": metrics}
        if self._gold:
            info["gold"] = gold_for_turn(self._gold(self._example), len(self._answers))
        return info


def tool_prompt(tools: Sequence[Tool], text: str) -> list[Message]:
    """The question, after a system message that tells of the tools as Qwen's own template does."""
    schemas = "\n".join(json.dumps(tool_schema(tool)) for tool in tools)
    call = '{"name": <function-name>, "arguments": <args-json-object>}'
    system = (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n"
        f"<tools>\n{schemas}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within "
        f"<tool_call></tool_call> XML tags:\n<tool_call>\n{call}\n</tool_call>"
    )
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]
