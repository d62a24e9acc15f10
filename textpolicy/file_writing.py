"""Writing files: a reader sees the old file or the new file, never a part of one.

A file is written under a temporary name in the same folder, flushed and renamed.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from stat import S_IMODE

from textpolicy.errors import UnwritableError

# The number is of the process that writes the file.
_PARTIAL = re.compile(r"\..*\.(\d+)-\w+\.partial(\.\w+)?")
_PARTIAL_FOLDER = re.compile(r"\..*\.(\d+)-\w+\.unfinished")
_LONGEST_STEM = 100
# Linux says here what the umask is.
_STATUS = Path("/proc/self/status")
_PRIVATE_FILE, _PRIVATE_FOLDER = 0o600, 0o700


@contextmanager
def atomic_replace(target: Path, *, private: bool = False) -> Generator[Path]:
    """Yield an empty temporary file to write, and rename it to `target` after the block.

    A symbolic link at `target` is replaced, and the file that it names is not changed. Only the
    owner can read a `private` file; others may read another file if they may read its folder.
    """
    temporary: Path | None = None
    try:
        temporary = _new_partial_file(target)
        yield temporary
        os.chmod(temporary, _PRIVATE_FILE if private else 0o666 & ~_umask() & _mode(target.parent))
        flush_to_disk(temporary)
        os.replace(temporary, target)
        flush_to_disk(target.parent)
    except OSError as error:
        raise _unwritable(target, error) from error
    except RuntimeError as error:
        reason = temporary and _why_disk_refuses(temporary)
        raise _unwritable(target, reason or error) from error
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)


def remove_partial_files(folder: Path) -> None:
    """Remove temporary files that a killed process left in the folder.

    The caller must be the single process that writes in this folder, and be between two files.
    Another process that lives may be writing a report there.
    """
    for path in folder.glob(".*.partial*"):
        if match := _PARTIAL.fullmatch(path.name):
            writer = int(match[1])
            if writer == os.getpid() or not _is_alive(writer):
                path.unlink(missing_ok=True)


@contextmanager
def replace_folder(target: Path) -> Generator[Path]:
    """Yield an empty temporary folder to fill, and rename it to `target` after the block.

    An earlier folder at `target` is moved aside first and removed last. A kill leaves the earlier
    folder, or none, or the new one, and never a part of one.
    """
    temporary: Path | None = None
    try:
        temporary = _new_partial_folder(target)
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask() & _mode(target.parent))
        for path in (*temporary.rglob("*"), temporary):
            flush_to_disk(path)
        if target.exists():
            earlier = _new_partial_folder(target)
            os.replace(target, earlier)
            try:
                os.replace(temporary, target)
            finally:
                # Ctrl-C between the two renames must not lose the earlier folder.
                if not target.exists():
                    os.replace(earlier, target)
            shutil.rmtree(earlier)
        else:
            os.replace(temporary, target)
        flush_to_disk(target.parent)
    except OSError as error:
        raise _unwritable(target, error) from error
    except RuntimeError as error:
        if temporary and (reason := _why_disk_refuses(temporary / "more")):
            raise _unwritable(target, reason) from error
        raise
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_partial_folders(parent: Path) -> None:
    """Remove temporary folders that killed processes left in the folder `parent`."""
    for path in parent.glob(".*.unfinished"):
        match = _PARTIAL_FOLDER.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink() and not _is_alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def flush_to_disk(path: Path) -> None:
    """Return when the disk has the content of a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_private(path: Path, flags: int) -> int:
    """Open a file that only its owner can read, made if it is missing, and return its descriptor.

    A symbolic link is not followed: the error has the number ELOOP.
    """
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, _PRIVATE_FILE)


def make_private_folder(path: Path) -> Path:
    """Make a folder that only its owner can read, unless it exists, and return its path."""
    path.mkdir(mode=_PRIVATE_FOLDER, parents=True, exist_ok=True)
    return path


def make_writable_folder(folder: Path, target: Path) -> None:
    """Make the folder that will hold `target`. Raise UnwritableError if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(target, error) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _unwritable(target, "this process has no permission to write in the folder")


def _new_partial_file(target: Path) -> Path:
    # mx.save_safetensors appends ".safetensors" to a name with another suffix.
    descriptor, name = tempfile.mkstemp(
        prefix=f".{target.stem[:_LONGEST_STEM]}.{os.getpid()}-",
        suffix=f".partial{target.suffix}",
        dir=target.parent,
    )
    os.close(descriptor)
    return Path(name)


def _new_partial_folder(target: Path) -> Path:
    prefix = f".{target.name[:_LONGEST_STEM]}.{os.getpid()}-"
    return Path(tempfile.mkdtemp(prefix=prefix, suffix=".unfinished", dir=target.parent))


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _mode(folder: Path) -> int:
    return S_IMODE(folder.stat().st_mode)


def _umask() -> int:
    if _STATUS.exists():
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return int(lines["Umask"], 8)
    # Elsewhere there is no other way to ask. Files that other threads make meanwhile are private.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _why_disk_refuses(path: Path) -> str | None:
    """Return the system's reason for taking no more bytes, which mlx does not report, or None."""
    try:
        with path.open("ab") as file:
            file.write(bytes(1 << 16))
    except OSError as error:
        return error.strerror
    return None


def _unwritable(target: Path, reason: object) -> UnwritableError:
    return UnwritableError(
        f"{target} cannot be written: {reason}\n"
        "Choose a path in a folder that this process may write to, on a disk with free space"
    )
