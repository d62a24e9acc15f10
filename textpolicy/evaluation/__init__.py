"""Held-out tasks: how good a policy is, and whether another is better."""

from textpolicy.evaluation.greedy import Score, measure

__all__ = ["Score", "measure"]
