"""The sockets of processes, from the tables of the kernel."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

LISTENING = "0A"
THIS_MACHINE = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
"""127.0.0.1, the same for IPv6, and ::1, as the kernel writes them."""


def addresses_of(processes: Iterable[int], *states: str) -> list[str]:
    """Return the own addresses of the TCP sockets of these processes, in these states or in all."""
    sockets = set()
    for process in processes:
        with suppress(OSError):
            for file in Path("/proc", str(process), "fd").iterdir():
                with suppress(OSError):
                    sockets.add(os.readlink(file))
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path("/proc/net", table).read_text().splitlines()[1:]
    ]
    return [
        row[1].partition(":")[0]
        for row in rows
        if f"socket:[{row[9]}]" in sockets and (not states or row[3] in states)
    ]
