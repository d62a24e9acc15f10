"""Checks to build rewards from: `float(math_equal(completion, answer))`.

Only `code_share` and `run_code` run what a model wrote. No check takes long, whatever the text.
"""

from textpolicy.rewards.thoughts import split_thought
from textpolicy.rewards.verifiers.answer_in_text import (
    final_answer,
    has_layout,
    last_boxed,
    last_number,
    tag_share,
    tagged,
)
from textpolicy.rewards.verifiers.code_tests import code_share, python_in, run_code
from textpolicy.rewards.verifiers.instructions.following import instructions_followed
from textpolicy.rewards.verifiers.json_schema import json_match, json_problems, read_json
from textpolicy.rewards.verifiers.mathematics.answers import math_equal, number_equal, number_in
from textpolicy.rewards.verifiers.sandbox.code_judge import CodeRun
from textpolicy.rewards.verifiers.text_answers import (
    choice_in,
    choice_match,
    exact_match,
    length_score,
    normalised_match,
    overlong_penalty,
    pattern_match,
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
    "instructions_followed",
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
    "split_thought",
    "tag_share",
    "tagged",
]
