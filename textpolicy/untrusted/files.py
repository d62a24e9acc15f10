"""Opening a file that may be anything: a pipe, a device, a folder, too large, or not UTF-8."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from textpolicy.errors import UnreadableError
from textpolicy.untrusted.bounds import MAX_CONFIG_BYTES


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raise `UnreadableError` for anything else.

    Opening a named pipe would wait for a writer, and a device may never end.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UnreadableError(f"{shown_path(path)} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UnreadableError(f"{shown_path(path)} is not the name of a file: {error}") from error
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind):
        os.close(descriptor)
        what = "a folder" if stat.S_ISDIR(kind) else "a pipe, a socket or a device"
        raise UnreadableError(f"{shown_path(path)} is {what}; expected a file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, *, limit: int = MAX_CONFIG_BYTES) -> bytes:
    """Return the content of a regular file of at most `limit` bytes."""
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UnreadableError(
            f"{shown_path(path)} has more than {limit:,} bytes, the most that is read of such a "
            "file. Check that the path names the right file"
        )
    return content


def read_utf8(path: Path, *, limit: int = MAX_CONFIG_BYTES) -> str:
    """Return the text of a regular UTF-8 file of at most `limit` bytes. A byte-order mark is cut.

    The error for other encodings names the line.
    """
    content = read_bytes(path, limit=limit)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UnreadableError(
            f"{shown_path(path)}, line {line}: not UTF-8 ({error.reason}). Save the file as UTF-8"
        ) from error


def shown_path(path: Path) -> str:
    """Return a path for a message; the middle of a very long one is left out."""
    text = str(path)
    return text if len(text) <= 200 else f"{text[:100]}…{text[-80:]}"
