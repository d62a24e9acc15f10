"""The files of a run by name, and the lock that allows only one process to write them."""

import errno
import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, TextIO

from textpolicy.adapters.files.adapter_file import peek_version
from textpolicy.errors import ConfigError, DataError, UnreadableError
from textpolicy.file_writing import (
    atomic_replace,
    make_private_folder,
    open_private,
    remove_partial_files,
)
from textpolicy.untrusted.parsing import read_toml_file

_SUFFIX = ".safetensors"
_MARK = ".textpolicy-run"
_RUNNING = ".running"
_MOST_NAMED = 5
GIVEN_UP = "given_up.jsonl"


class RunDirectory:
    """The files of a run in the folder `path`, which is absolute from the start."""

    def __init__(self, path: Path) -> None:
        # A reward may change the working directory.
        self.path = path = path.absolute()
        self.config = path / "config.toml"
        """All options of the run, with the defaults that it used."""
        self.metrics = path / "metrics.jsonl"
        """The metrics: one JSON object a step."""
        self.samples = path / "samples.jsonl"
        """The completions: one JSON object each."""
        self.validation_rows = path / "validation.jsonl"
        """The rows that supervised training has measured on: one JSON object each."""
        self.adapters = path / "adapters"
        """The folder of the adapter files."""
        self.latest = self.adapters / f"latest{_SUFFIX}"
        """The adapter of the last update. Policies reload this file."""
        self.best = self.adapters / f"best{_SUFFIX}"
        """The best adapter so far: by its held-out score, or else by its training reward."""
        self.checkpoints = path / "checkpoints"
        """The folder of the checkpoints."""
        self.rejected_batches = path / "rejected"
        """The folder of the batches whose gradient was not finite."""
        self.workers = path / "workers"
        """The folder of the rollout workers: the adapter versions that they load."""
        self.given_up = self.workers / GIVEN_UP
        """The tasks that ended their workers: one JSON object each."""
        self.report = path / "report.html"
        """The HTML report of the run."""
        self.tensorboard = path / "tensorboard"
        """The folder of TensorBoard's event files."""
        self.wandb = path / "wandb"
        """The folder of the files of Weights & Biases."""
        self.tracking_id = path / ".tracking-id"
        """The id by which services know the run."""
        self._mark = path / _MARK
        self._running = path / _RUNNING

    @property
    def exists(self) -> bool:
        """Whether the folder holds a run: the mark or a checkpoint, and no config alone."""
        return self.config.is_file() and (self._mark.is_file() or self.has_checkpoint)

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint, damaged or whole."""
        # Python 3.13 raises if it lists a folder whose name no file can have.
        return self.checkpoints.is_dir() and any(
            path.stem.isdecimal() for path in self.checkpoints.glob(f"*{_SUFFIX}")
        )

    @property
    def size(self) -> int:
        """The bytes of the files in the folder."""
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())

    @property
    def is_running(self) -> bool:
        """Whether a process writes the run now. Asking cannot keep a process from starting."""
        if not self._running.is_file():
            return False
        with self._running.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def claim(self) -> None:
        """Make the folder of a new run and mark it.

        Raise `ConfigError`, with nothing changed, if the folder holds a run or anything else.
        """
        try:
            self._check_is_free()
            make_private_folder(self.path)
            self._open(self._mark).close()
        except OSError as error:
            raise ConfigError(
                f"cannot write to the output folder {self.path}: {error.strerror}. Choose a "
                "folder that you may write to"
            ) from error

    def check_is_new(self) -> None:
        """Raise `ConfigError` if the folder holds a run that got as far as its first adapter."""
        if self.has_checkpoint or self.latest.exists():
            raise ConfigError(
                f"{self.path} holds an earlier run. Choose another folder, or resume the run: "
                f"--resume {self.path}"
            )

    def _check_is_free(self) -> None:
        self.check_is_new()
        for folder in (self.path, *self.path.parents):
            if folder.is_symlink() and not folder.exists():
                raise ConfigError(
                    f"the output folder {self.path} cannot be made: {folder} is a symbolic link "
                    f"to {os.readlink(folder)}, which is not there. Make that folder, or choose "
                    "another --output"
                )
        if self._mark.is_file() or not self.path.is_dir():
            return
        if found := sorted(os.listdir(self.path)):
            more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
            raise ConfigError(
                f"the output folder {self.path} is not empty and is not a run. It holds "
                f"{', '.join(found[:_MOST_NAMED])}{more}. A run writes only into a folder of its "
                f"own. Choose another folder, such as --output {self.path / 'run'}"
            )

    @contextmanager
    def lock(self) -> Generator[None]:
        """Hold the lock inside the block. Raise `ConfigError` if another process holds the lock.

        Also raise `ConfigError` if a file or folder of the run is a link that leads out of it.
        """
        # The system releases the locks of a killed process.
        with self._open(self._mark) as mark, self._open(self._running) as running:
            try:
                fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"process {mark.read().strip()} is writing the run {self.path}. Wait until the "
                    "process ends, or stop it: a first Ctrl-C saves a checkpoint"
                ) from error
            # Processes that ask whether the run is running hold this lock for a moment.
            fcntl.flock(running, fcntl.LOCK_EX)
            mark.truncate(0)
            mark.write(str(os.getpid()))
            mark.flush()
            self._check_own_files()
            for folder in (self.adapters, self.checkpoints):
                make_private_folder(folder)
            yield

    def _open(self, path: Path) -> TextIO:
        """Open a file of the run to read and append, made if it is missing; follow no link."""
        try:
            descriptor = open_private(path, os.O_RDWR | os.O_APPEND)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise _not_own([f"{path} is a symbolic link"]) from error
            raise
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise _not_own([f"{path} is not a file"])
        return os.fdopen(descriptor, "r+", encoding="utf-8")

    def _check_own_files(self) -> None:
        folders = (
            *(self.adapters, self.checkpoints, self.rejected_batches),
            *(self.tensorboard, self.wandb, self.workers),
        )
        files = (
            self.given_up,
            self.config,
            self.metrics,
            self.samples,
            self.validation_rows,
            self.report,
            self.tracking_id,
        )
        wrong = [f"{path} is a symbolic link" for path in (*folders, *files) if path.is_symlink()]
        wrong += [f"{path} is not a file" for path in files if path.exists() and not path.is_file()]
        if wrong:
            raise _not_own(wrong)

    def read_settings(self) -> dict[str, dict[str, Any]]:
        """Return the config by section. The config may be of another version of TextPolicy."""
        try:
            content = read_toml_file(self.config)
        except UnreadableError as error:
            raise DataError(str(error)) from error
        return {name: value for name, value in content.items() if isinstance(value, dict)}

    def write_config(self, text: str) -> None:
        """Write the config atomically. Half a config would be read as one with other options."""
        with atomic_replace(self.config, private=True) as temporary:
            temporary.write_text(text, "utf-8")

    def write_validation_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows for `--eval-data`. What JSON does not have, such as a date, becomes text."""
        lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        with atomic_replace(self.validation_rows, private=True) as temporary:
            temporary.write_text("".join(lines), "utf-8")

    @property
    def best_is_measured(self) -> bool:
        """Whether the best adapter has the best held-out score, not the best training reward."""
        settings = self.read_settings()
        supervised = "data" in settings
        return supervised or settings.get("evaluation", {}).get("every") is not None

    def chosen_adapter(self) -> Path:
        """Return the best adapter if it was chosen by held-out scores, or else the latest one."""
        measured = self.best.exists() and self.best_is_measured
        adapter = self.best if measured else self.latest
        if not adapter.exists():
            raise ConfigError(
                f"the run {self.path} has no adapter {adapter.name}. Let the run train for a "
                "step, or name another adapter"
            )
        return adapter

    def keep_adapter(self, adapter: Path, name: str | None = None) -> Path:
        """Copy an adapter file to its version, or to a name such as "best". Return the new path.

        The copy is a hard link: later versions replace the file `adapter` and never change it.
        """
        target = self.adapter_of(peek_version(adapter)) if name is None else self._adapter(name)
        with atomic_replace(target) as temporary:
            temporary.unlink()
            try:
                os.link(adapter, temporary)
            except OSError:
                # Some file systems have no hard links.
                shutil.copyfile(adapter, temporary)
        return target

    def adapter_of(self, version: int) -> Path:
        """Return the path of the adapter of this version, which exists if it was kept."""
        return self._adapter(f"{version:08d}")

    def _adapter(self, name: str) -> Path:
        return self.adapters / f"{name}{_SUFFIX}"

    def keep_latest_adapter(self) -> None:
        """Copy the latest adapter to its version, if there is a latest adapter."""
        if self.latest.exists():
            self.keep_adapter(self.latest)

    def remove_kept_adapters(self, *, last: int, best: int | None = None) -> None:
        """Remove all adapters that were kept by their version but the `last` and the best one."""
        kept = self.kept_adapters()
        for path in kept[: max(0, len(kept) - last)]:
            if int(path.stem) != best:
                path.unlink()

    def remove_adapters_after(self, version: int) -> None:
        """Remove adapters that were kept by versions above this one: the run makes them again."""
        for path in self.kept_adapters():
            if int(path.stem) > version:
                path.unlink()

    def kept_adapters(self) -> list[Path]:
        """Return the adapters that were kept by their version, in the order of their versions."""
        paths = [path for path in self.adapters.glob(f"*{_SUFFIX}") if path.stem.isdecimal()]
        return sorted(paths, key=lambda path: int(path.stem))

    def remove_earlier_start(self) -> None:
        """Remove what is left of a start that saved no checkpoint. The caller holds the lock.

        Its adapters were never measured by the run that starts now.
        """
        self.remove_kept_adapters(last=0)
        for path in (self.latest, self.best, self.report, self.given_up):
            path.unlink(missing_ok=True)

    def remove_partial_files(self) -> None:
        """Remove files that a killed process left unfinished. The caller must hold the lock."""
        folders = (self.path, self.adapters, self.checkpoints, self.rejected_batches)
        for folder in folders:
            remove_partial_files(folder)


def new_directory(name: str, parent: Path = Path("runs")) -> RunDirectory:
    """Return a new run directory of this name; a taken name gets a number at its end."""
    plain = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"
    numbered = (parent / (f"{plain}-{number}" if number > 1 else plain) for number in count(1))
    return RunDirectory(next(folder for folder in numbered if not os.path.lexists(folder)))


def _not_own(wrong: list[str]) -> ConfigError:
    return ConfigError(
        f"{' and '.join(wrong)}. A run writes only into its own folder and follows no link out of "
        "it. Put the file or folder itself in the place of the link, or remove the link"
    )
