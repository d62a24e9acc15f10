"""The folder in which this library keeps what it has found out about the machine."""

import os
from pathlib import Path

_WRITABLE_BY_OTHERS = 0o022


def cache_folder() -> Path:
    """Return the library's folder in the user's cache folder; make it if it is missing.

    Raise OSError if it cannot be made, or if other users could change the files in it. Raise
    RuntimeError if the user has no home folder.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "textpolicy"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = folder.stat()
    if about.st_uid != os.getuid() or about.st_mode & _WRITABLE_BY_OTHERS:
        raise PermissionError(f"others than you could change the files in {folder}")
    return folder
