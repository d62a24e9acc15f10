"""What outside.py asks an engine, and how the engine answers. Standard library and numpy only.

Each engine runs in a process of its own, and often in an environment of its own, without
TextPolicy. The question is a JSON file: texts of users, contexts of token ids, the size of the
vocabulary, and cases. All cases of one question have the same model and different adapters. The
answer holds the log-probabilities of the whole vocabulary after each context, by case.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Question:
    """`cases` are the adapters by the names of the cases. None is the model without an adapter."""

    model: str
    cases: dict[str, str | None]
    texts: list[str]
    contexts: list[list[int]]
    vocabulary: int


def read_question() -> Question:
    return Question(**json.loads(Path(sys.argv[1]).read_text("utf-8")))


def write_answer(
    packages: Sequence[str],
    prompts: list[list[int]],
    rows_by_case: dict[str, Iterable[np.ndarray]],
) -> None:
    """Write the log-probabilities, the versions, and the prompts of the texts as token ids."""
    arrays = {name: np.stack(list(rows)) for name, rows in rows_by_case.items()}
    versions = {name: version(name) for name in packages}
    about = np.array(json.dumps({"versions": versions, "prompts": prompts}))
    np.savez(sys.argv[2], about=about, **arrays)


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
