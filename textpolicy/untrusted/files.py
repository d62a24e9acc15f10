"""Opening a file that may be anything: a pipe, a device, a folder, too large, or not UTF-8."""

import gzip
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from textpolicy.errors import UnreadableError
from textpolicy.untrusted.bounds import MAX_CONFIG_BYTES, MAX_DATA_LINE_BYTES


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


def utf8_lines(path: Path, *, limit: int | None = None) -> Iterator[str]:
    """Yield the lines of a UTF-8 file, with their ends; a file named NAME.gz is unpacked.

    No line has more than `MAX_DATA_LINE_BYTES`, and all together have at most `limit` bytes.
    """
    number, read = 0, 0
    with open_regular(path) as file:
        packed = path.suffix.lower() == ".gz"
        opened = gzip.GzipFile(fileobj=file) if packed else file
        while line := _next_line(opened.readline, path, number + 1):
            number, read = number + 1, read + len(line)
            if limit is not None and read > limit:
                raise UnreadableError(
                    f"{shown_path(path)} has more than {limit:,} bytes, the most that is read as a "
                    "whole. Stream the rows (--data-stream), or split the file"
                )
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UnreadableError(
                    f"{shown_path(path)}, line {number}: not UTF-8 ({error.reason}). Save the file "
                    "as UTF-8"
                ) from error


def _next_line(readline: Callable[[int], bytes], path: Path, number: int) -> bytes:
    try:
        line = readline(MAX_DATA_LINE_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UnreadableError(
            f"{shown_path(path)}, line {number}: cannot be read ({error}). Check the file, or copy "
            "it again"
        ) from error
    if len(line) > MAX_DATA_LINE_BYTES:
        raise UnreadableError(
            f"{shown_path(path)}, line {number}: the line has more than {MAX_DATA_LINE_BYTES:,} "
            "bytes, the most that a row may have. Check that the file has one row in each line"
        )
    return line


def shown_path(path: Path) -> str:
    """Return a path for a message; the middle of a very long one is left out."""
    text = str(path)
    return text if len(text) <= 200 else f"{text[:100]}…{text[-80:]}"
