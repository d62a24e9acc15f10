"""Tasks of reasoning-gym by name, made without end and scored by its own verifiers.

Some of those verifiers evaluate the answer as Python or hand it to sympy's parser, which does. What
they are given is checked first: text of a model never runs.
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

from textpolicy.environments.environment import Environment, question_and_answer
from textpolicy.environments.faults import environment_errors, verify_or_zero
from textpolicy.errors import ConfigError, TaskError

_MAX_TOKENS = 512
# These evaluate answers: as Python literals, as sympy expressions.
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
# Tasks are picked by number from this many; a few kinds prepare all of theirs beforehand.
_TASKS = 10**9
_FEW_TASKS = 10_000
_PREPARED = {"acre", "gsm_symbolic", "list_functions", "word_ladder"}
_REQUEST = "\n\nEnd with the answer alone, between <answer> and </answer>."
_NAMES = {"sin", "cos", "tan", "exp", "log", "sqrt", "asin", "acos", "atan", "sinh", "cosh", "tanh"}
_WORD = re.compile(r"[A-Za-z]+")
_EXPRESSION = re.compile(r"[A-Za-z0-9+\-*/(). ^]*")
_POWER = re.compile(r"\*\*|\^")
# A plain number or fraction, and no power of a power.
_EXPONENT = re.compile(
    r" *(?:\( *-?([0-9]{1,3}) *(?:/ *[0-9]{1,3} *)?\)|-?([0-9]{1,3}))(?! *(?:\*\*|\^|[0-9.]))"
)


def load(name: str, **options: Any) -> Environment:
    """The task of that name; `options` are those of its configuration, such as a difficulty."""
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
            f"reasoning-gym has no single task {name!r}; the nearest of its {len(known)}: {near}"
        )
    task = ReasoningTask(name, options)
    return question_and_answer(
        f"reasoning_gym:{name}",
        task.draw,
        task.reward,
        gold=task.gold if task.has_gold else None,
        max_tokens=_MAX_TOKENS,
    )


@dataclass(frozen=True)
class ReasoningTask:
    """One kind of task. Its reward is the library's score of what stands between answer tags, or
    of the whole completion where there are none.
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
        """Whether the library knows an answer, and not only what is right of one."""
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
        return self.options.get("size", _FEW_TASKS if self.name in _PREPARED else _TASKS)

    @cached_property
    def _dataset(self) -> Any:
        library: Any = import_module("reasoning_gym")
        return library.create_dataset(self.name, **{"seed": 0, "size": self._size, **self.options})


def is_safe_to_verify(answer: str, name: str) -> bool:
    """Whether the verifier of that task may see the answer: nothing in it can run, or for long."""
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
    """Numbers, single letters and functions of a short list; all powers together stay small."""
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
