"""Evaluation on held-out tasks: the reward of a policy, and a comparison of two policies."""

from textpolicy.evaluation.compare import Comparison, TaskDifference, compare
from textpolicy.evaluation.evaluate import (
    Evaluation,
    Evaluator,
    HeldOut,
    MeanReward,
    evaluate,
    evaluate_greedy,
    pass_at_k,
)

__all__ = [
    "Comparison",
    "Evaluation",
    "Evaluator",
    "HeldOut",
    "MeanReward",
    "TaskDifference",
    "compare",
    "evaluate",
    "evaluate_greedy",
    "pass_at_k",
]
