"""Environments: training tasks, held-out tasks and their reward. Ready ones are in `envs/`."""

from textpolicy.environments.bridges.gymnasium import from_gymnasium
from textpolicy.environments.chat import ChatEnv
from textpolicy.environments.check_env import check_env
from textpolicy.environments.data_files import load_rows
from textpolicy.environments.dataset import Dataset
from textpolicy.environments.environment import (
    Environment,
    from_dataset,
    from_function,
    sum_turn_rewards,
)
from textpolicy.environments.load import load, ready_names
from textpolicy.environments.mcp.tools import mcp_tools
from textpolicy.environments.play import gold_answers
from textpolicy.environments.space import AnyText
from textpolicy.environments.tools import ToolEnv, tool_prompt

__all__ = [
    "AnyText",
    "ChatEnv",
    "Dataset",
    "Environment",
    "ToolEnv",
    "check_env",
    "from_dataset",
    "from_function",
    "from_gymnasium",
    "gold_answers",
    "load",
    "load_rows",
    "mcp_tools",
    "ready_names",
    "sum_turn_rewards",
    "tool_prompt",
]
