"""Rewards: the user's functions, found, called and held to their word."""

from textpolicy.rewards.load import load_reward
from textpolicy.rewards.score import score

__all__ = ["load_reward", "score"]
