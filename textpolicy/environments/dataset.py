"""Tasks from rows: shuffled by a seed, and some held out to measure on."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count
from math import ceil
from pathlib import Path
from random import Random
from typing import Any

from textpolicy.environments.data_files import DataRow, check_column, load_rows, to_rows
from textpolicy.environments.template import Template, check_template, fill_template
from textpolicy.errors import DataError
from textpolicy.types import Prompt, Task


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A finite list of tasks in two parts that share no prompt: `train` and `held_out`."""

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
        """Tasks of the rows; every column goes to the reward as part of `example`.

        `prompt` is a template over the columns; without one the column "prompt" is taken as it
        is, text or messages. The share `held_out` of the different prompts, at least one, is
        chosen by their hashes: the order of rows does not matter, nor does any seed.
        """
        tasks = [
            Task(id=f"{name}/{number}", prompt=written, example=row)
            for number, (row, written) in enumerate(_written(to_rows(rows), prompt), start=1)
        ]
        chosen = _held_out_prompts(tasks, held_out)
        return cls(
            name=name,
            train=[task for task in tasks if _key(task.prompt) not in chosen],
            held_out=[task for task in tasks if _key(task.prompt) in chosen],
        )

    @classmethod
    def load(
        cls, source: str | Path, prompt: Template | None = None, *, held_out: float = 0.1
    ) -> "Dataset":
        """Tasks of the rows that `load_rows` reads from `source`."""
        return cls.from_rows(load_rows(source), prompt, name=Path(source).stem, held_out=held_out)

    def draw(self, rng: Random) -> tuple[Prompt, DataRow]:
        """One of the training tasks."""
        task = rng.choice(self.train)
        return task.prompt, task.example

    def stream(self, seed: int) -> Iterator[Task]:
        """The training tasks, epoch after epoch, each in an order that the seed decides."""
        for epoch in count():
            order = list(self.train)
            Random(f"{self.name}/{seed}/{epoch}").shuffle(order)
            yield from order

    def heldout(self, number: int) -> list[Task]:
        """The first `number` held-out tasks, or all where there are fewer."""
        return list(self.held_out[:number])


def _written(
    rows: Sequence[DataRow], template: Template | None
) -> Iterator[tuple[Mapping[str, Any], Prompt]]:
    if template is None:
        if "prompt" not in rows[0]:
            raise DataError(
                f"the rows have no column 'prompt', they have {list(rows[0])}: say how a prompt is "
                "made from these, as in --prompt 'Solve: {question}'"
            )
        check_column("prompt", rows)
        yield from ((row, _checked(row["prompt"], n)) for n, row in enumerate(rows, start=1))
        return
    check_template(template, rows[0])
    for number, row in enumerate(rows, start=1):
        try:
            yield row, fill_template(template, row)
        except DataError as error:
            raise DataError(f"row {number}: {error}") from error


def _checked(prompt: Any, number: int) -> Prompt:
    """The prompt, if it is text or a list of messages."""
    messages = (
        isinstance(prompt, list)
        and prompt
        and all(
            isinstance(m, Mapping)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
            for m in prompt
        )
    )
    if not messages and not (isinstance(prompt, str) and prompt):
        raise DataError(
            f"row {number}: its prompt is {prompt!r:.60}; expected text, or messages such as "
            '[{"role": "user", "content": "2+2="}]'
        )
    return prompt


def _held_out_prompts(tasks: Sequence[Task], share: float) -> set[str]:
    """The prompts with the smallest hashes: as many as the share says, and at least one."""
    if not 0 < share < 1:
        raise DataError(f"held_out is {share}; expected a share between 0 and 1")
    different = sorted({_key(task.prompt) for task in tasks}, key=_digest)
    if len(different) < 2:
        raise DataError(
            f"the rows have {len(different)} different prompt: at least 2 are needed, one to train "
            "on and one to measure on"
        )
    return set(different[: min(ceil(share * len(different)), len(different) - 1)])


def _key(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(list(map(dict, prompt)))


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=8).digest()
