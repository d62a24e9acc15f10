"""Passing new adapter versions between processes: a publisher writes a file, watchers read it."""

import re
import time
from pathlib import Path

from textpolicy.adapters.container import AdapterContainer
from textpolicy.adapters.files.adapter_file import file_signature, prepare_adapter_path
from textpolicy.errors import AdapterError, ConfigError


class AdapterPublisher:
    """Writes each version to `path`.

    The last `keep` versions stay in the same folder as files of their own, such as
    adapters-00000007.safetensors. Older files with such names are removed.
    """

    def __init__(self, path: str | Path, *, keep: int = 0) -> None:
        if keep < 0:
            raise ConfigError(f"keep is {keep}; expected 0 or more versions to keep")
        self.path = prepare_adapter_path(path)
        self.keep = keep

    def publish(self, adapters: AdapterContainer) -> int:
        """Write the present adapter and return its version."""
        if self.keep:
            adapters.publish(self._path_of(adapters.version))
            for version in sorted(self.versions())[: -self.keep]:
                self._path_of(version).unlink()
        return adapters.publish(self.path)

    def versions(self) -> dict[int, Path]:
        """Return the files of the kept versions."""
        name = re.compile(rf"{re.escape(self.path.stem)}-(\d{{8,}}){re.escape(self.path.suffix)}")
        found = ((name.fullmatch(file.name), file) for file in self.path.parent.iterdir())
        return {int(match[1]): file for match, file in found if match}

    def _path_of(self, version: int) -> Path:
        return self.path.with_name(f"{self.path.stem}-{version:08d}{self.path.suffix}")


class AdapterWatcher:
    """Notices when another adapter is in a file.

    A file that exists at the start counts as new only with `from_start`.
    """

    def __init__(self, path: str | Path, *, from_start: bool = False) -> None:
        self.path = Path(path).absolute()
        self._glance: tuple[int, ...] | None = None
        self._found = file_signature(self.path)
        self._accepted = None if from_start else self._found

    def poll(self, *, at_a_glance: bool = False) -> Path | None:
        """Return the path if the file holds another adapter than the last accepted one.

        `at_a_glance`, the file is opened only if its time, place or size is new. If it is replaced
        twice within one tick of the clock, only a later call without `at_a_glance` notices that.
        """
        if at_a_glance:
            before, self._glance = self._glance, _stat_numbers(self.path)
            if self._glance == before:
                return None
        self._found = file_signature(self.path)
        return None if self._found in (None, self._accepted) else self.path

    def accept(self) -> None:
        """Mark the last polled file as loaded; without this call `poll` returns it again."""
        self._accepted = self._found

    def wait(self, timeout: float, *, every: float = 0.01) -> Path:
        """Return the path as soon as the file is new. Raise AdapterError after `timeout` s."""
        deadline = time.monotonic() + timeout
        while (path := self.poll()) is None:
            if time.monotonic() >= deadline:
                raise AdapterError(
                    f"There were no new adapters in {self.path} for {timeout} s. Check that the "
                    "publishing process is alive and publishes to this path"
                )
            time.sleep(every)
        return path


def _stat_numbers(path: Path) -> tuple[int, ...] | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_mtime_ns, stat.st_ino, stat.st_size
