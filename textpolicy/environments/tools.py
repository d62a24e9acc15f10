"""ToolEnv: an episode in which the model calls Python functions until it gives its answer."""

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import gymnasium as gym

from textpolicy.environments.chat import ChatEnv, DrawFn, GoldFn, TurnRewardFn
from textpolicy.environments.faults import call_tool
from textpolicy.environments.mcp.tools import McpEpisode, McpTool
from textpolicy.environments.request_process import call_tool_in_process, pack
from textpolicy.environments.space import AnyText
from textpolicy.environments.tool_calls import (
    MAX_CALLS_PER_ANSWER,
    ParseCalls,
    Tool,
    ToolCall,
    parse_tagged_calls,
    problem_with_call,
    tool_schema,
)
from textpolicy.errors import TaskError
from textpolicy.rewards import Rewards
from textpolicy.types import Message, RewardFn

_MAX_OUTPUT_CHARACTERS = 4000

CallTool = Callable[[Tool, Mapping[str, Any]], tuple[str, bool]]
"""Calls a tool; returns its text and True, or the text of an error and False."""


class ToolEnv(gym.Env[str, str]):
    """Each call in an answer gets one tool message. An answer without a call ends the episode.

    If a call is not valid or its tool raises, the message is the error. `info["metrics"]` counts
    calls and errors. With `tool_timeout`, tools run in another process, and a call that takes more
    seconds is killed, which is an error too. Tools of an MCP server (`mcp_tools`) run in the
    server, always with a time limit; `close` ends the server. Rewards are as in `ChatEnv`.
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
        tool_timeout: float | None = None,
    ) -> None:
        self.observation_space = AnyText()
        self.action_space = AnyText()
        self._call: CallTool = call_tool
        # It never opens a session if no tool belongs to an MCP server.
        self._mcp = McpEpisode(tool_timeout)
        if tool_timeout is not None:
            self._call = partial(call_tool_in_process, tool_timeout)
            for tool in tools:
                if not isinstance(tool, McpTool):
                    pack(tool, f"tool {tool.__name__}")
        self.tools = {tool.__name__: tool for tool in tools}
        if len(self.tools) < len(tools):
            raise TaskError(
                f"several tools have the same name; expected one of each name in {len(tools)} "
                f"tools: {[tool.__name__ for tool in tools]}"
            )
        self.schemas = [tool_schema(tool) for tool in tools]
        self._parse = parse
        self._chat = ChatEnv(
            draw, self._reply, reward, turn_reward=turn_reward, gold=gold, max_turns=max_turns
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self._mcp.close()
        self._calls = self._errors = 0
        observation, info = self._chat.reset(seed=seed)
        return observation, info | {"tools": deepcopy(self.schemas), "metrics": self._metrics()}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._outputs: list[str] = []
        observation, value, terminated, truncated, info = self._chat.step(action)
        messages = [{"role": "tool", "content": output} for output in self._outputs]
        info |= {"messages": messages, "metrics": self._metrics()}
        return observation, value, terminated, truncated, info

    def close(self) -> None:
        """End the sessions with MCP servers."""
        self._mcp.close()

    def _reply(self, answers: Sequence[str], example: Mapping[str, Any]) -> str | None:
        calls = self._parse(answers[-1], self.tools)
        self._outputs = [self._run(call) for call in calls[:MAX_CALLS_PER_ANSWER]]
        return "\n".join(self._outputs) if calls else None

    def _run(self, call: ToolCall) -> str:
        self._calls += 1
        if problem := problem_with_call(call, self.tools):
            self._errors += 1
            return f"error: {problem}"
        tool = self.tools[call.name]
        if isinstance(tool, McpTool):
            output, returned = self._mcp.call(tool, call.arguments)
        else:
            output, returned = self._call(tool, call.arguments)
        self._errors += not returned
        if len(output) > _MAX_OUTPUT_CHARACTERS:
            return f"{output[:_MAX_OUTPUT_CHARACTERS]}… ({len(output)} characters, cut)"
        return output

    def _metrics(self) -> dict[str, float]:
        return {"tool_calls": float(self._calls), "tool_errors": float(self._errors)}


def tool_prompt(tools: Sequence[Tool], text: str) -> list[Message]:
    """Return the question after a system message with the tools, written as Qwen's template."""
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
