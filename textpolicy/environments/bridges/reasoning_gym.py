"""Tasks of reasoning-gym by name, made without end and scored by its own verifiers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from random import Random
from typing import Any

from textpolicy.environments.environment import Environment, question_and_answer
from textpolicy.environments.faults import environment_code
from textpolicy.errors import ConfigError, TaskError

MAX_TOKENS = 512
_REQUEST = "\n\nEnd with the answer alone, between <answer> and </answer>."
_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


def load(name: str, **options: Any) -> Environment:
    """The task of that name; `options` are those of its configuration, such as a difficulty."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ConfigError(
            "environments of reasoning-gym need the library: pip install "
            "'textpolicy[reasoning-gym]'"
        ) from error
    if name not in DATASETS:
        near = get_close_matches(name, list(DATASETS), n=3)
        raise TaskError(
            f"reasoning-gym has no task {name!r}; the nearest of its {len(DATASETS)}: {near}"
        )
    task = ReasoningTask(name, options)
    return question_and_answer(
        f"reasoning_gym:{name}", task.draw, task.reward, gold=task.gold, max_tokens=MAX_TOKENS
    )


@dataclass(frozen=True)
class ReasoningTask:
    """One kind of task. Its reward is the library's score of what stands between answer tags, or
    of the whole completion where there are none.
    """

    name: str
    options: Mapping[str, Any]

    def draw(self, rng: Random) -> tuple[str, dict[str, Any]]:
        seed = rng.randrange(2**31)
        with environment_code(f"reasoning_gym:{self.name}", f"seed {seed}"):
            entry = dict(self._dataset(seed)[0])
        return f"{entry['question']}{_REQUEST}", entry

    def gold(self, example: Mapping[str, Any]) -> str:
        return str(example["answer"])

    def reward(self, prompt: str, completion: str, example: Mapping[str, Any]) -> float:
        tagged = _ANSWER.findall(completion)
        answer = tagged[-1].strip() if tagged else completion
        return float(self._verifier.score_answer(answer, dict(example)))

    @cached_property
    def _verifier(self) -> Any:
        return self._dataset(0)

    def _dataset(self, seed: int) -> Any:
        from reasoning_gym import create_dataset

        return create_dataset(self.name, seed=seed, size=1, **self.options)
