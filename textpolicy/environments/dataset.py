"""Dataset: tasks from rows of data. A seed shuffles them; a share of the prompts is held out."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count
from math import ceil
from pathlib import Path
from random import Random
from typing import Any

from textpolicy.environments.data_files import DataRow, load_rows, to_rows
from textpolicy.environments.template import Template, check_template, fill_template
from textpolicy.errors import DataError
from textpolicy.types import Prompt, Task


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A finite list of tasks in two parts, `train` and `held_out`, which share no prompt."""

    name: str
    train: Sequence[Task]
    held_out: Sequence[Task]

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[DataRow],
        prompt: Template | None = None,
        *,
        name: str = "rows",
        held_out: float = 0.1,
    ) -> "Dataset":
        """Return the tasks of the rows. The reward gets all columns of a row as its `example`.

        `prompt` is a template over the columns. Without a template the column "prompt" is the
        prompt, as text or messages. The share `held_out` of the different prompts, at least one
        prompt, is held out. Hashes of the prompts choose which, so neither the order of the rows
        nor a seed changes the held-out tasks.
        """
        tasks = [
            Task(id=f"{name}/{number}", prompt=text, example=row)
            for number, (row, text) in enumerate(_with_prompts(to_rows(rows), prompt), start=1)
        ]
        chosen = _held_out_prompts(tasks, held_out)
        return cls(
            name=name,
            train=[task for task in tasks if prompt_key(task.prompt) not in chosen],
            held_out=[task for task in tasks if prompt_key(task.prompt) in chosen],
        )

    @classmethod
    def load(
        cls, source: str | Path, prompt: Template | None = None, *, held_out: float = 0.1
    ) -> "Dataset":
        """Return the tasks of the rows that `load_rows` reads from `source`."""
        return cls.from_rows(load_rows(source), prompt, name=Path(source).stem, held_out=held_out)

    def draw(self, rng: Random) -> tuple[Prompt, DataRow]:
        """Return the prompt and the row of a random training task."""
        task = rng.choice(self.train)
        return task.prompt, task.example

    def stream(self, seed: int) -> Iterator[Task]:
        """Yield the training tasks epoch after epoch. The seed decides the order of each epoch."""
        for epoch in count():
            order = list(self.train)
            Random(f"{self.name}/{seed}/{epoch}").shuffle(order)
            yield from order

    def heldout(self, number: int) -> list[Task]:
        """Return the first `number` held-out tasks, or all if there are fewer."""
        return list(self.held_out[:number])


def _with_prompts(
    rows: Sequence[DataRow], template: Template | None
) -> Iterator[tuple[DataRow, Prompt]]:
    if template is None:
        if "prompt" not in rows[0]:
            raise DataError(
                f"the rows have no column 'prompt'. Their columns are {list(rows[0])}. Write a "
                "prompt from these columns, as in --prompt 'Solve: {question}'"
            )
        yield from ((row, _checked_prompt(row.get("prompt"), n)) for n, row in enumerate(rows, 1))
        return
    check_template(template, rows[0])
    for number, row in enumerate(rows, start=1):
        try:
            yield row, fill_template(template, row)
        except DataError as error:
            raise DataError(f"row {number}: {error}") from error


def _checked_prompt(prompt: Any, number: int) -> Prompt:
    """Return the prompt. Raise `DataError` if it is neither text nor a list of messages."""
    is_messages = isinstance(prompt, list) and prompt and all(map(_is_message, prompt))
    if not is_messages and not (isinstance(prompt, str) and prompt):
        raise DataError(
            f"row {number}: the prompt is {prompt!r:.60}; expected text, or messages such as "
            '[{"role": "user", "content": "2+2="}]'
        )
    return prompt


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )


def _held_out_prompts(tasks: Sequence[Task], share: float) -> set[str]:
    """Return the prompts with the smallest hashes: the given share of them, and at least one."""
    if not 0 < share < 1:
        raise DataError(f"held_out is {share}; expected a share between 0 and 1")
    prompts = sorted(
        {prompt_key(task.prompt) for task in tasks},
        key=lambda text: blake2b(text.encode(), digest_size=8).digest(),
    )
    if len(prompts) < 2:
        raise DataError(
            f"the rows have {len(prompts)} different prompt, but at least 2 are needed: one for "
            "training and one to hold out"
        )
    return set(prompts[: min(ceil(share * len(prompts)), len(prompts) - 1)])


def prompt_key(prompt: Prompt) -> str:
    """Return a text that tells prompts apart."""
    return prompt if isinstance(prompt, str) else json.dumps(list(map(dict, prompt)))
