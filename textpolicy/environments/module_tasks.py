"""The tasks of an environment's module: what `make` draws, or rows in a `PROMPT`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from textpolicy.environments.chat import DrawFn
from textpolicy.environments.data_source import DataSource
from textpolicy.environments.dataset import Dataset
from textpolicy.environments.environment import GeneratedTasks, TaskSplit
from textpolicy.environments.streamed_rows import StreamedTasks
from textpolicy.errors import TaskError


def tasks_of_module(
    contents: Mapping[str, Any], name: str, data: DataSource
) -> tuple[TaskSplit, DrawFn]:
    """Return the tasks that a module's `make`, or its `PROMPT` and rows, describe."""
    if "PROMPT" in contents:
        tasks = _tasks_of_rows(contents, name, data)
        return tasks, tasks.draw
    refuse_data(name, data)
    draw = contents["make"]
    if "problem" not in contents:
        return GeneratedTasks(name=name, draw=draw), draw
    problem = contents["problem"]
    return GeneratedTasks(name=name, draw=draw, problem=lambda task: problem(task.example)), draw


def _tasks_of_rows(
    contents: Mapping[str, Any], name: str, data: DataSource
) -> Dataset | StreamedTasks:
    """Return tasks of the rows of `data`, or else of the module's own rows or own address."""
    own: Any = contents.get("ROWS")
    address: str | None = contents.get("DATA")
    if data.is_empty and data.only_measured and own is None and address:
        data = replace(data, held_out=address)
    if data.train is None and not (data.only_measured and data.held_out):
        if own is None and address is None:
            raise TaskError(f"{name} has no rows of its own. Name a file of rows: --data FILE")
        note = _note_about_own_rows(name, own, address)
        # The module's own names need no other ones.
        data = replace(data, train=own or address, stream=data.stream and own is None)
        tasks = data.tasks(contents["PROMPT"], name=name)
        return replace(tasks, split_note=note) if isinstance(tasks, Dataset) else tasks
    return data.tasks(contents["PROMPT"], name=name)


def _note_about_own_rows(name: str, own: Any, address: str | None) -> str:
    if own is None:
        return f"environment {name} trains on {address}, because no other rows are named (--data)"
    if address is None:
        return ""
    return (
        f"environment {name} has {len(own)} rows of its own, for a first try. The published rows "
        f"are --data {address}"
    )


def refuse_data(name: str, data: DataSource) -> None:
    """Raise `TaskError` if rows are given to an environment that makes its tasks itself."""
    if not data.is_empty:
        raise TaskError(
            f"environment {name} makes its tasks itself and takes no rows, but got the file "
            f"{str(data)!r}. Leave out the environment or the file"
        )
