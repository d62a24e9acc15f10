"""Held-out tasks: how good a policy is, and whether another is better."""

from textpolicy.evaluation.compare import Comparison, Difference, compare
from textpolicy.evaluation.evaluate import Evaluation, Evaluator, HeldOut, evaluate, measure
from textpolicy.evaluation.statistics import Score, pass_at_k

__all__ = [
    "Comparison",
    "Difference",
    "Evaluation",
    "Evaluator",
    "HeldOut",
    "Score",
    "compare",
    "evaluate",
    "measure",
    "pass_at_k",
]
