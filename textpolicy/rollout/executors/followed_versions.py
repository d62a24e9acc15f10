"""`FollowedVersions`: a file for each adapter version that a worker may still have to load."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from textpolicy.rollout.executors.rollout_worker import sha256_of
from textpolicy.rollout.executors.worker_link import PublishedVersion

_SUFFIX = ".safetensors"


class FollowedVersions:
    """Keeps versions in a folder while the trainer replaces the file that it publishes to."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.newest: PublishedVersion | None = None
        self.drop_before(None)

    def add(self, version: int, published: Path) -> PublishedVersion:
        """Keep the present content of a file. It is a hard link where the disk has such links."""
        path = self._folder / f"{version:08d}{_SUFFIX}"
        path.unlink(missing_ok=True)
        try:
            os.link(published, path)
        except OSError:
            shutil.copyfile(published, path)
        self.newest = PublishedVersion(version=version, path=path, sha256=sha256_of(path))
        return self.newest

    def drop_before(self, version: int | None) -> None:
        """Remove the files of all versions below this one, or all files."""
        for path in self._folder.glob(f"*{_SUFFIX}"):
            if version is None or int(path.stem) < version:
                with suppress(FileNotFoundError):
                    path.unlink()
