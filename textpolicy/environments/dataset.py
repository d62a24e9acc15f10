"""Dataset: tasks from rows of data. A seed shuffles them; a share of the prompts is held out."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count
from math import ceil
from pathlib import Path
from random import Random
from typing import Any

from textpolicy.environments.data_files import DataRow, LocatedRow, load_rows, to_rows
from textpolicy.environments.faults import outcome_of
from textpolicy.environments.template import Template, fill_template
from textpolicy.errors import DataError
from textpolicy.types import Prompt, Task

WritePrompt = Callable[[DataRow], Prompt]
"""Writes the prompt of a row. What it raises becomes an error that names the row."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A finite list of tasks in two parts, `train` and `held_out`, which share no prompt."""

    name: str
    train: Sequence[Task]
    held_out: Sequence[Task]
    split_note: str = ""
    """What a reader of the scores must know about the rows, or ""."""

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[DataRow],
        prompt: Template | WritePrompt | None = None,
        *,
        name: str = "rows",
        held_out: float = 0.1,
    ) -> "Dataset":
        """Return the tasks of the rows. The reward gets all columns of a row as its `example`.

        `prompt` is a template over the columns, or a function of a row. Without it the column
        "prompt" is the prompt, as text or messages. The share `held_out` of the different prompts,
        at least one prompt, is held out. Hashes of the prompts choose which, so neither the order
        of the rows nor a seed changes the held-out tasks.
        """
        located = ((f"row {n}", row) for n, row in enumerate(to_rows(rows), start=1))
        return cls.from_tasks(tasks_of_rows(located, prompt, name), name=name, held_out=held_out)

    @classmethod
    def from_tasks(
        cls, tasks: Sequence[Task], *, name: str, held_out: float = 0.1, split_note: str = ""
    ) -> "Dataset":
        """Return the tasks in two parts; hashes of their prompts choose which are held out."""
        chosen = _held_out_prompts(tasks, held_out)
        return cls(
            name=name,
            train=[task for task in tasks if prompt_key(task.prompt) not in chosen],
            held_out=[task for task in tasks if prompt_key(task.prompt) in chosen],
            split_note=split_note,
        )

    @classmethod
    def load(
        cls, source: str | Path, prompt: Template | None = None, *, held_out: float = 0.1
    ) -> "Dataset":
        """Return the tasks of the rows that `load_rows` reads from `source`."""
        return cls.from_rows(load_rows(source), prompt, name=Path(source).stem, held_out=held_out)

    def draw(self, rng: Random) -> tuple[Prompt, DataRow]:
        """Return the prompt and the row of a random training task."""
        task = rng.choice(self.train or self.held_out)
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


def tasks_of_rows(
    rows: Iterable[LocatedRow], prompt: Template | WritePrompt | None, name: str
) -> list[Task]:
    """Return the task of each row."""
    numbered = enumerate(rows, start=1)
    return [task_of_row(row, prompt, f"{name}/{n}", where) for n, (where, row) in numbered]


def task_of_row(row: DataRow, prompt: Template | WritePrompt | None, id: str, where: str) -> Task:
    """Return the task of a row. Errors begin with `where`, the location of the row."""
    if callable(prompt):
        text, error = outcome_of(lambda: prompt(row))
        if error is not None:
            raise DataError(f"{where}: no prompt can be written: {error}")
        return Task(id=id, prompt=_checked_prompt(text, where), example=row)
    if prompt is None:
        if "prompt" not in row:
            raise DataError(
                f"{where}: the rows have no column 'prompt'. Their columns are {list(row)}. Write "
                "a prompt from these columns, as in --prompt 'Solve: {question}', or name the "
                "column, as in --columns prompt=question"
            )
        return Task(id=id, prompt=_checked_prompt(row["prompt"], where), example=row)
    try:
        return Task(id=id, prompt=fill_template(prompt, row), example=row)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _checked_prompt(prompt: Any, where: str) -> Prompt:
    """Return the prompt. Raise `DataError` if it is neither text nor a list of messages."""
    is_messages = isinstance(prompt, list) and prompt and all(map(_is_message, prompt))
    if not is_messages and not (isinstance(prompt, str) and prompt):
        raise DataError(
            f"{where}: the prompt is {prompt!r:.60}; expected text, or messages such as "
            '[{"role": "user", "content": "2+2="}]'
        )
    if isinstance(prompt, str):
        return prompt
    # Files of tables give every message the keys of all messages, with null where one has none.
    return [{key: value for key, value in m.items() if value is not None} for m in prompt]


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
