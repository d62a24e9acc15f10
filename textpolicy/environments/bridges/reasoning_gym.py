"""Tasks of the reasoning-gym library, scored by the library's verifiers.

Some verifiers evaluate an answer as Python, or pass the answer to sympy's parser, which evaluates
text as Python. Answers are checked before a verifier gets them, so no text of a model is executed.
"""

import ast
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from importlib import import_module
from random import Random
from typing import Any

from textpolicy.environments.environment import Environment, from_function
from textpolicy.environments.faults import environment_errors, verify_or_zero
from textpolicy.errors import ConfigError, TaskError

_MAX_TOKENS = 512
# Tasks whose verifiers evaluate answers, as Python literals and as sympy expressions.
LITERAL_TASKS = {"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"}
EXPRESSION_TASKS = {
    "countdown",
    "intermediate_integration",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
}
_MAX_CHARACTERS = 10_000
_MAX_EXPRESSION_CHARACTERS = 300
_MAX_POWER = 1000
# A task is drawn by its number. A few datasets make all their tasks first, so they get fewer.
_SIZE = 10**9
_SMALL_SIZE = 10_000
_SMALL_DATASETS = {"acre", "gsm_symbolic", "list_functions", "word_ladder"}
_REQUEST = "\n\nEnd with the answer alone, between <answer> and </answer>."
_NAMES = {"sin", "cos", "tan", "exp", "log", "sqrt", "asin", "acos", "atan", "sinh", "cosh", "tanh"}
_WORD = re.compile(r"[A-Za-z]+")
_EXPRESSION = re.compile(r"[A-Za-z0-9+\-*/(). ^]*")
_POWER = re.compile(r"\*\*|\^")
# A whole number or a fraction, which is not itself raised to a power.
_EXPONENT = re.compile(
    r" *(?:\( *-?([0-9]{1,3}) *(?:/ *[0-9]{1,3} *)?\)|-?([0-9]{1,3}))(?! *(?:\*\*|\^|[0-9.]))"
)


def load(name: str, **options: Any) -> Environment:
    """Return the environment of a task. `options` set, for example, its difficulty."""
    try:
        known: Any = import_module("reasoning_gym.factory").DATASETS
    except ImportError as error:
        raise ConfigError(
            "environments of reasoning-gym need the library: pip install "
            "'textpolicy[reasoning-gym]'"
        ) from error
    if name == "composite" or name not in known:
        near = get_close_matches(name, list(known), n=3)
        raise TaskError(
            f"reasoning-gym has no single task {name!r}; the nearest names among its {len(known)} "
            f"are {near}"
        )
    task = ReasoningTask(name, options)
    return from_function(
        f"reasoning_gym:{name}",
        task.draw,
        task.reward,
        gold=task.gold if task.has_gold else None,
        max_tokens=_MAX_TOKENS,
    )


@dataclass(frozen=True)
class ReasoningTask:
    """One task of the library, made without end.

    The reward is the library's score of the text between the answer tags, or of the whole
    completion if there are no tags.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def draw(self, rng: Random) -> tuple[str, dict[str, Any]]:
        number = rng.randrange(self._size)
        with environment_errors(f"reasoning_gym:{self.name}", f"task {number}"):
            entry = dict(self._dataset[number])
        return f"{entry['question']}{_REQUEST}", entry

    @property
    def has_gold(self) -> bool:
        """Return whether the library gives an answer. Some tasks only have a verifier."""
        return isinstance(self._dataset[0]["answer"], str)

    def gold(self, example: Mapping[str, Any]) -> str:
        return example["answer"]

    def reward(self, prompt: str, completion: str, example: Mapping[str, Any]) -> float:
        _, tag, rest = completion.rpartition("<answer>")
        answer = rest.partition("</answer>")[0].strip() if tag else completion
        if answer != example["answer"] and not is_safe_to_verify(answer, self.name):
            return 0.0
        return verify_or_zero(self._dataset.score_answer, answer, dict(example))

    @property
    def _size(self) -> int:
        return self.options.get("size", _SMALL_SIZE if self.name in _SMALL_DATASETS else _SIZE)

    @cached_property
    def _dataset(self) -> Any:
        library: Any = import_module("reasoning_gym")
        return library.create_dataset(self.name, **{"seed": 0, "size": self._size, **self.options})


def is_safe_to_verify(answer: str, name: str) -> bool:
    """Return whether the task's verifier can evaluate the answer safely and quickly."""
    if name in LITERAL_TASKS:
        return len(answer) <= _MAX_CHARACTERS and _is_literal(answer)
    if name in EXPRESSION_TASKS:
        names = set[str]() if name in ("countdown", "puzzle24") else _NAMES
        return len(answer) <= _MAX_EXPRESSION_CHARACTERS and _is_expression(answer, names)
    return len(answer) <= _MAX_CHARACTERS


def _is_literal(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False
    return True


def _is_expression(text: str, names: Set[str]) -> bool:
    """Return whether the text has only numbers, letters, the functions `names` and small powers."""
    if not _EXPRESSION.fullmatch(text):
        return False
    if any(len(word) > 1 and word not in names for word in _WORD.findall(text)):
        return False
    powers = 1
    for power in _POWER.finditer(text):
        exponent = _EXPONENT.match(text, power.end())
        if exponent is None:
            return False
        powers *= max(1, int(exponent[1] or exponent[2]))
    return powers <= _MAX_POWER
