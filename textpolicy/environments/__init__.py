"""What a run trains on: a stream of tasks, a fixed held-out list, and the reward of both."""

from textpolicy.environments.chat import ChatEnv
from textpolicy.environments.check_env import check_env
from textpolicy.environments.data_files import columns_of, load_rows
from textpolicy.environments.dataset import Dataset
from textpolicy.environments.environment import (
    Environment,
    from_dataset,
    from_gymnasium,
    question_and_answer,
    sum_turn_rewards,
)
from textpolicy.environments.gold import gold_answers
from textpolicy.environments.load import load, ready_names
from textpolicy.environments.single_turn import SingleTurnEnv
from textpolicy.environments.space import AnyText
from textpolicy.environments.tools import ToolEnv, tool_prompt

__all__ = [
    "AnyText",
    "ChatEnv",
    "Dataset",
    "Environment",
    "SingleTurnEnv",
    "ToolEnv",
    "check_env",
    "columns_of",
    "from_dataset",
    "from_gymnasium",
    "gold_answers",
    "load",
    "load_rows",
    "question_and_answer",
    "ready_names",
    "sum_turn_rewards",
    "tool_prompt",
]
