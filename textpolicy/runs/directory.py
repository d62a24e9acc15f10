"""All that a run leaves behind, by file name, and a lock that keeps a second writer out."""

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from textpolicy.adapters.files.adapter_file import peek_version
from textpolicy.adapters.files.tensor_file import atomic_replace, remove_partial_files
from textpolicy.errors import ConfigError

_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class RunDirectory:
    """The parts of a run in `path`.

    `latest` and `best` are adapters that are also in `adapters` under their version, as far as
    that version was kept; policies follow `latest`.
    """

    path: Path

    @property
    def config(self) -> Path:
        """Every option of the run, given or not."""
        return self.path / "config.toml"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """One JSON object a completion."""
        return self.path / "samples.jsonl"

    @property
    def adapters(self) -> Path:
        """The folder of adapter files."""
        return self.path / "adapters"

    @property
    def latest(self) -> Path:
        """The adapter of the last update."""
        return self.adapters / f"latest{_SUFFIX}"

    @property
    def best(self) -> Path:
        """The adapter that did best so far."""
        return self.adapters / f"best{_SUFFIX}"

    @property
    def checkpoints(self) -> Path:
        """The folder of what the run can be gone on with from."""
        return self.path / "checkpoints"

    @property
    def rejected_batches(self) -> Path:
        """The folder of batches whose gradient was not finite."""
        return self.path / "rejected"

    @property
    def report(self) -> Path:
        """The run as a page to look at."""
        return self.path / "report.html"

    @property
    def exists(self) -> bool:
        """Whether a run is here: its config is written before its first step."""
        return self.config.is_file()

    @property
    def is_running(self) -> bool:
        """Whether a process holds the lock at this moment."""
        if not self._lock.exists():
            return False
        try:
            with self.lock():
                return False
        except ConfigError:
            return True

    @contextmanager
    def lock(self) -> Generator[None]:
        """Be the only writer inside the block; an error if another process is. A killed process
        holds nothing."""
        file = self._lock.open("a+")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise ConfigError(
                    f"the run {self.path} is being written by process {file.read().strip()}: wait "
                    "for it to end, or stop it (a first Ctrl-C makes a checkpoint)"
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    @property
    def _lock(self) -> Path:
        return self.path / ".lock"

    def write_config(self, text: str) -> None:
        """Keep the config; a kill leaves the one of before or this one, never half of one, which
        would be taken for a config with other options."""
        with atomic_replace(self.config) as temporary:
            temporary.write_text(text, "utf-8")

    def keep_adapter(self, adapter: Path, name: str | None = None) -> Path:
        """Keep an adapter file under its version, or a name such as "best"; returns the new path.

        The file shares the bytes of `adapter`, which later versions replace and never change.
        """
        target = self.adapters / f"{name or f'{peek_version(adapter):08d}'}{_SUFFIX}"
        with atomic_replace(target) as temporary:
            try:
                os.link(adapter, temporary)
            except OSError:
                # Some file systems know no links.
                shutil.copyfile(adapter, temporary)
        return target

    def keep_latest_adapter(self) -> None:
        """Keep the latest adapter under its version too, if there is one yet."""
        if self.latest.exists():
            self.keep_adapter(self.latest)

    def remove_partial_files(self) -> None:
        """Remove what a killed process was writing; to be called by the holder of the lock."""
        for folder in (self.path, self.adapters, self.checkpoints):
            remove_partial_files(folder)


def new_directory(name: str, parent: Path = Path("runs")) -> RunDirectory:
    """A directory for a run of this name that no earlier run has taken."""
    plain = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"
    numbered = (parent / (f"{plain}-{number}" if number > 1 else plain) for number in count(1))
    return RunDirectory(next(folder for folder in numbered if not folder.exists()))


def claim(directory: RunDirectory) -> None:
    """Make the directory and see that it can be written to, before a model is loaded for it."""
    # A run that failed before it had anything to lose is no hindrance.
    if directory.latest.exists() or any(directory.checkpoints.glob(f"*{_SUFFIX}")):
        raise ConfigError(
            f"{directory.path} holds an earlier run: choose another folder, or go on with that run "
            f"by --resume {directory.path}"
        )
    try:
        directory.path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory.path):
            pass
    except OSError as error:
        raise ConfigError(
            f"cannot write to the output folder {directory.path}: {error.strerror}; expected a "
            "folder that is yours, or a path where one can be made"
        ) from error
