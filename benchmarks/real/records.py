"""The file of finished runs: one record for each run, written as soon as the run is finished."""

import fcntl
import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from textpolicy.config import TrainConfig
from textpolicy.experiment.assembly import plain_settings
from textpolicy.file_writing import atomic_replace

Record = dict[str, Any]


class RecordFile:
    """The records of a JSON file. A new record replaces an older one of the same run."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[Record]:
        if not self._path.exists():
            return []
        return json.loads(self._path.read_text("utf-8"))["runs"]

    def find(self, settings: dict[str, Any]) -> Record | None:
        """Return the record of a run with these settings, or None.

        Options that did not exist when a run was recorded must have their defaults.
        """
        return next((one for one in self.read() if _same(one["settings"], settings)), None)

    def add(self, record: Record) -> None:
        """Write the file with this record. A kill leaves the old or the new file."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self._path.parent):
            kept = [one for one in self.read() if _name_of(one) != _name_of(record)]
            text = "\n,\n".join(map(json.dumps, [*kept, record]))
            with atomic_replace(self._path) as temporary:
                temporary.write_text(f'{{"runs": [\n{text}\n]}}\n', "utf-8")


@contextmanager
def _locked(folder: Path) -> Generator[None]:
    """Let two processes that train different runs add their records one after the other."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _same(recorded: dict[str, Any], settings: dict[str, Any]) -> bool:
    defaults = {key: v for key, v in plain_settings(TrainConfig()).items() if v is not None}
    then, now = ({**one, "options": defaults | one["options"]} for one in (recorded, settings))
    return then == now


def _name_of(record: Record) -> tuple[Any, ...]:
    settings = record["settings"]
    options = settings["options"]
    names = ("task.env", "run.seed", "run.steps", "model.name")
    return (
        *(settings[name] for name in ("side", "variant", "control")),
        *(options[name] for name in names),
    )
