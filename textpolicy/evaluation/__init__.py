"""Held-out tasks: how good a policy is, and whether another is better."""

from textpolicy.evaluation.compare import Comparison, TaskDifference, compare
from textpolicy.evaluation.evaluate import Evaluation, Evaluator, HeldOut, evaluate, evaluate_greedy
from textpolicy.evaluation.statistics import MeanReward, pass_at_k

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
