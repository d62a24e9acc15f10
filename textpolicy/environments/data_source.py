"""DataSource: the addresses that rows come from, and the tasks that the rows become."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from textpolicy.environments.columns import ColumnNames, check_columns, with_columns
from textpolicy.environments.data_files import (
    DataRow,
    LocatedRow,
    iterate_rows,
    load_rows_with_locations,
)
from textpolicy.environments.dataset import Dataset, WritePrompt, prompt_key, tasks_of_rows
from textpolicy.environments.streamed_rows import StreamedTasks
from textpolicy.environments.template import Template
from textpolicy.errors import DataError
from textpolicy.types import Task

PromptSource = Template | WritePrompt | None


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Rows to train on and, if they are apart, rows to measure on.

    `train` is an address as of `load_rows`, or rows; `held_out` is an address. `columns` gives
    columns of both other names. With `stream`, training rows are read while they are used. With
    `only_measured`, training rows are read only if the held-out rows are a part of them.
    """

    train: str | Path | Sequence[DataRow] | None = None
    held_out: str | Path | None = None
    columns: ColumnNames = field(default_factory=dict[str, Any])
    stream: bool = False
    only_measured: bool = False

    def __post_init__(self) -> None:
        check_columns(self.columns)

    @classmethod
    def of(cls, data: "str | Path | DataSource | None") -> "DataSource":
        """Return the source that `data` is, or that has it as its address."""
        return data if isinstance(data, DataSource) else cls(train=data)

    @property
    def is_empty(self) -> bool:
        """Whether no rows are named."""
        return self.train is None and self.held_out is None

    def __str__(self) -> str:
        addresses = (self.train, self.held_out)
        return " and ".join(str(one) for one in addresses if isinstance(one, str | Path))

    def rows(self) -> Iterator[DataRow]:
        """Yield the training rows; they are all in memory unless the source is a stream."""
        yield from (row for _, row in (self._stream() if self.stream else self._whole()))

    def tasks(self, prompt: PromptSource = None, *, name: str) -> Dataset | StreamedTasks:
        """Return the tasks of the rows, with the prompts that `prompt` writes."""
        if self.held_out is None:
            if self.stream:
                return StreamedTasks(name, self._stream, prompt)
            return Dataset.from_tasks(tasks_of_rows(self._whole(), prompt, name), name=name)
        held_out = self._held_out_tasks(prompt, name)
        if self.only_measured or self.train is None:
            return Dataset(name=name, train=[], held_out=held_out)
        if self.stream:
            return StreamedTasks(name, self._stream, prompt, held_out=held_out)
        tasks = tasks_of_rows(self._whole(), prompt, name)
        measured = {prompt_key(task.prompt) for task in held_out}
        train = [task for task in tasks if prompt_key(task.prompt) not in measured]
        return Dataset(
            name=name, train=self._some(train), held_out=held_out, split_note=_note(tasks, train)
        )

    def _held_out_tasks(self, prompt: PromptSource, name: str) -> list[Task]:
        # Without a split in the address, it must be the only one: another may be trained on.
        rows = self._read(self.held_out, None, stream=False)
        return tasks_of_rows(rows, prompt, f"{name}/held-out")

    def _some(self, train: list[Task]) -> list[Task]:
        if not train:
            raise DataError(
                f"every row of {self.train} has a prompt of {self.held_out}, so no row is left to "
                "train on. Name other rows to train on, or to measure on (--eval-data)"
            )
        return train

    def _whole(self) -> Iterator[LocatedRow]:
        return self._read(self.train, "train", stream=False)

    def _stream(self) -> Iterator[LocatedRow]:
        return self._read(self.train, "train", stream=True)

    def _read(self, source: Any, split: str | None, *, stream: bool) -> Iterator[LocatedRow]:
        if not isinstance(source, str | Path):
            numbered = enumerate(source or (), start=1)
            located = ((f"row {number}", row) for number, row in numbered)
        elif stream:
            located = iterate_rows(source, split=split)
        else:
            located = iter(load_rows_with_locations(source, split=split))
        return ((where, with_columns(row, self.columns, where)) for where, row in located)


def _note(tasks: Sequence[Task], train: Sequence[Task]) -> str:
    if not (left_out := len(tasks) - len(train)):
        return ""
    return (
        f"{left_out} of {len(tasks)} training rows have the prompt of a held-out row and are left "
        "out of training"
    )
