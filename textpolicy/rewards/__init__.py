"""Rewards: the user's functions, found, called and held to their word."""

from textpolicy.rewards.composition import OnError, Rewards, as_rewards
from textpolicy.rewards.contract import Reward, Sample, Score, conversation, reward, sample_of
from textpolicy.rewards.load import load_reward
from textpolicy.rewards.scorer import Incident, Scorer, Scoring, Verdict, score, scorer_of

__all__ = [
    "Incident",
    "OnError",
    "Reward",
    "Rewards",
    "Sample",
    "Score",
    "Scorer",
    "Scoring",
    "Verdict",
    "as_rewards",
    "conversation",
    "load_reward",
    "reward",
    "sample_of",
    "score",
    "scorer_of",
]
