"""The files of a run by name, and the lock that allows only one process to write them."""

import fcntl
import os
import re
import shutil
import tempfile
import tomllib
from collections.abc import Generator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from textpolicy.adapters.files.adapter_file import peek_version
from textpolicy.adapters.files.tensor_file import atomic_replace, remove_partial_files
from textpolicy.errors import ConfigError, DataError

_SUFFIX = ".safetensors"
_LOCK = ".lock"


class RunDirectory:
    """The files of a run in the folder `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        """All options of the run, with the defaults that it used."""
        self.metrics = path / "metrics.jsonl"
        """The metrics: one JSON object a step."""
        self.samples = path / "samples.jsonl"
        """The completions: one JSON object each."""
        self.adapters = path / "adapters"
        """The folder of the adapter files."""
        self.latest = self.adapters / f"latest{_SUFFIX}"
        """The adapter of the last update. Policies reload this file."""
        self.best = self.adapters / f"best{_SUFFIX}"
        """The best adapter so far."""
        self.checkpoints = path / "checkpoints"
        """The folder of the checkpoints."""
        self.rejected_batches = path / "rejected"
        """The folder of the batches whose gradient was not finite."""
        self.report = path / "report.html"
        """The HTML report of the run."""

    @property
    def exists(self) -> bool:
        """Whether the folder holds a run. A run writes its config before its first step."""
        return self.config.is_file()

    @property
    def is_running(self) -> bool:
        """Whether a process holds the lock now."""
        if not (self.path / _LOCK).exists():
            return False
        try:
            with self.lock():
                return False
        except ConfigError:
            return True

    @contextmanager
    def lock(self) -> Generator[None]:
        """Hold the lock inside the block. Raise `ConfigError` if another process holds the lock."""
        # The system releases the lock of a killed process.
        with (self.path / _LOCK).open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise ConfigError(
                    f"process {file.read().strip()} is writing the run {self.path}. Wait until the "
                    "process ends, or stop it: a first Ctrl-C saves a checkpoint"
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def read_settings(self) -> dict[str, dict[str, Any]]:
        """Return the config by section. The config may be of another version of TextPolicy."""
        try:
            content = tomllib.loads(self.config.read_text("utf-8"))
        except ValueError as error:
            raise DataError(f"{self.config} is not TOML: {error}") from error
        return {name: value for name, value in content.items() if isinstance(value, dict)}

    def write_config(self, text: str) -> None:
        """Write the config atomically. Half a config would be read as one with other options."""
        with atomic_replace(self.config) as temporary:
            temporary.write_text(text, "utf-8")

    def keep_adapter(self, adapter: Path, name: str | None = None) -> Path:
        """Copy an adapter file to its version, or to a name such as "best". Return the new path.

        The copy is a hard link: later versions replace the file `adapter` and never change it.
        """
        target = self.adapters / f"{name or f'{peek_version(adapter):08d}'}{_SUFFIX}"
        with atomic_replace(target) as temporary:
            try:
                os.link(adapter, temporary)
            except OSError:
                # Some file systems have no hard links.
                shutil.copyfile(adapter, temporary)
        return target

    def keep_latest_adapter(self) -> None:
        """Copy the latest adapter to its version, if there is a latest adapter."""
        if self.latest.exists():
            self.keep_adapter(self.latest)

    def remove_partial_files(self) -> None:
        """Remove files that a killed process left unfinished. The caller must hold the lock."""
        for folder in (self.path, self.adapters, self.checkpoints):
            remove_partial_files(folder)


def new_directory(name: str, parent: Path = Path("runs")) -> RunDirectory:
    """Return a new run directory of this name; a taken name gets a number at its end."""
    plain = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"
    numbered = (parent / (f"{plain}-{number}" if number > 1 else plain) for number in count(1))
    return RunDirectory(next(folder for folder in numbered if not folder.exists()))


def claim(directory: RunDirectory) -> None:
    """Make the directory. Raise `ConfigError` if the directory holds a run or is not writable."""
    # A run that failed before its first adapter and checkpoint may be overwritten.
    if directory.latest.exists() or any(directory.checkpoints.glob(f"*{_SUFFIX}")):
        raise ConfigError(
            f"{directory.path} holds an earlier run. Choose another folder, or resume the run: "
            f"--resume {directory.path}"
        )
    try:
        directory.path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory.path):
            pass
    except OSError as error:
        raise ConfigError(
            f"cannot write to the output folder {directory.path}: {error.strerror}. Choose a "
            "folder that you may write to"
        ) from error
