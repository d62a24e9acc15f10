"""Checks to build rewards from. None runs code or hangs, whatever a model writes.

from textpolicy.rewards.verifiers import math_equal

def reward(completion, answer):
    return float(math_equal(completion, answer))
"""

from textpolicy.rewards.verifiers.code import CodeRun, code_share, python_in, run_code
from textpolicy.rewards.verifiers.extract import final_answer, last_boxed, last_number, tagged
from textpolicy.rewards.verifiers.layout import has_layout, tag_share
from textpolicy.rewards.verifiers.maths import math_equal, number_equal, number_in
from textpolicy.rewards.verifiers.patterns import pattern_match
from textpolicy.rewards.verifiers.structured import json_match, json_problems, read_json
from textpolicy.rewards.verifiers.text import (
    choice_in,
    choice_match,
    exact_match,
    length_score,
    normalised_match,
    overlong_penalty,
    repetition,
    set_match,
    set_overlap,
)

__all__ = [
    "CodeRun",
    "choice_in",
    "choice_match",
    "code_share",
    "exact_match",
    "final_answer",
    "has_layout",
    "json_match",
    "json_problems",
    "last_boxed",
    "last_number",
    "length_score",
    "math_equal",
    "normalised_match",
    "number_equal",
    "number_in",
    "overlong_penalty",
    "pattern_match",
    "python_in",
    "read_json",
    "repetition",
    "run_code",
    "set_match",
    "set_overlap",
    "tag_share",
    "tagged",
]
