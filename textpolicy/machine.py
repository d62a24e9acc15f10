"""What this machine has: memory for arrays and Python objects, and free disk space."""

import os
import resource
import shutil
from pathlib import Path

import mlx.core as mx

_NO_LIMIT = 1 << 60


def memory_bytes() -> int:
    """Return the bytes that this process may use: those of the GPU, or of a CPU's machine.

    Limits of a container (cgroup) and of the process (`ulimit -v`) count too.
    """
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [host, *_cgroup_limits(), resource.getrlimit(resource.RLIMIT_AS)[0]]
    if mx.default_device().type == mx.gpu:
        info = mx.device_info()
        limits += [int(info[key]) for key in ("memory_size", "total_memory") if key in info]
    return min(limit for limit in limits if 0 < limit < _NO_LIMIT)


def free_disk_bytes(path: Path) -> int:
    """Return the free bytes of the disk that holds `path`, or would hold it."""
    folder = next((one for one in (path, *path.absolute().parents) if one.is_dir()), Path("/"))
    return shutil.disk_usage(folder).free


def size_text(size: float) -> str:
    """Return bytes in the unit that reads best: MB, GB or TB."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size / 1e6:,.1f} MB"


def _cgroup_limits() -> list[int]:
    """Return the memory limits of the process's control group, of version 2 and of version 1."""
    files = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    found: list[int] = []
    for file in files:
        try:
            found.append(int(file.read_text()))
        except (OSError, ValueError):
            # No such group, or the word "max".
            continue
    return found
