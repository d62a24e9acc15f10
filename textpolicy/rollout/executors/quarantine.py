"""`Quarantine`: the tasks that are not played any more, because they have ended their workers."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from textpolicy.file_writing import open_private
from textpolicy.types import Task
from textpolicy.untrusted.parsing import parse_json


class Quarantine:
    """Ids of tasks, kept in a file of JSON lines, so that a resumed run knows them too."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ids = {row["task"] for row in _rows(path)}

    def __contains__(self, task: Task) -> bool:
        return task.id in self._ids

    def add(self, task: Task, why: str) -> None:
        """Never play this task again. Only the owner of the run can read the file."""
        self._ids.add(task.id)
        row = {"task": task.id, "prompt": task.asked, "why": why}
        descriptor = open_private(self.path, os.O_WRONLY | os.O_APPEND)
        with os.fdopen(descriptor, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, default=str) + "\n")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole rows of the file; a process that was killed may have left half a row."""
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError):
            row = parse_json(line)
            if isinstance(row, dict) and "task" in row:
                yield row
