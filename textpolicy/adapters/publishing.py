"""New versions from one process to others: a publisher writes, watchers notice."""

import re
import time
from pathlib import Path

from textpolicy.adapters.container import AdapterContainer
from textpolicy.adapters.files.adapter_file import file_signature, prepare_adapter_path
from textpolicy.errors import AdapterError, ConfigError


class AdapterPublisher:
    """Writes each version to `path`, where watchers find the newest.

    The last `keep` versions stay beside it as files of their own that no later version changes
    (adapters-00000007.safetensors). Older ones of this name are removed.
    """

    def __init__(self, path: str | Path, *, keep: int = 0) -> None:
        if keep < 0:
            raise ConfigError(f"keep is {keep}; expected 0 or more versions to keep")
        self.path = prepare_adapter_path(path)
        self.keep = keep

    def publish(self, adapters: AdapterContainer) -> int:
        """Write the adapters as they are now; returns their version."""
        if self.keep:
            adapters.publish(self._name(adapters.version))
            for version in sorted(self.versions())[: -self.keep]:
                self._name(version).unlink()
        return adapters.publish(self.path)

    def versions(self) -> dict[int, Path]:
        """The versions that have been kept."""
        name = re.compile(rf"{re.escape(self.path.stem)}-(\d{{8,}}){re.escape(self.path.suffix)}")
        found = ((name.fullmatch(file.name), file) for file in self.path.parent.iterdir())
        return {int(match[1]): file for match, file in found if match}

    def _name(self, version: int) -> Path:
        return self.path.with_name(f"{self.path.stem}-{version:08d}{self.path.suffix}")


class AdapterWatcher:
    """Notices new adapters in a file.

    What lies there already when watching begins is not new, unless `from_start`.
    """

    def __init__(self, path: str | Path, *, from_start: bool = False) -> None:
        self.path = Path(path).absolute()
        self._found = file_signature(self.path)
        self._seen = None if from_start else self._found

    def poll(self) -> Path | None:
        """The path, if its file is another one than the last that was accepted."""
        self._found = file_signature(self.path)
        return None if self._found in (None, self._seen) else self.path

    def accept(self) -> None:
        """What the last poll found is in use; a file that could not be used is found again."""
        self._seen = self._found

    def wait(self, timeout: float, *, every: float = 0.01) -> Path:
        """The path, as soon as its file is new; an error after `timeout` seconds without one."""
        deadline = time.monotonic() + timeout
        while (path := self.poll()) is None:
            if time.monotonic() >= deadline:
                raise AdapterError(
                    f"no new adapters in {self.path} for {timeout} s. Is the process that "
                    "publishes them alive, and does it publish to this path?"
                )
            time.sleep(every)
        return path
