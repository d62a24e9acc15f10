"""Rewards: load the user's functions, call them, kill them at a deadline, check their answers."""

from textpolicy.rewards.load_reward import load_reward
from textpolicy.rewards.reward_function import (
    CONTEXT_FIELDS,
    Reward,
    Sample,
    Score,
    append_completion,
    reward,
    sample_of,
)
from textpolicy.rewards.scorer import Incident, RewardLike, Scorer, Verdict, score, scorer_of
from textpolicy.rewards.weighted_rewards import Rewards, as_rewards

__all__ = [
    "CONTEXT_FIELDS",
    "Incident",
    "Reward",
    "RewardLike",
    "Rewards",
    "Sample",
    "Score",
    "Scorer",
    "Verdict",
    "append_completion",
    "as_rewards",
    "load_reward",
    "reward",
    "sample_of",
    "score",
    "scorer_of",
]
