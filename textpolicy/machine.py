"""What this machine has: memory for arrays and Python objects, free disk space, and idle cores.

On a Mac, programs and the GPU share one memory, and a program that wires or caches too much of it
can freeze the system. `keep_memory_in_bounds` sets mlx's limits for a run.
"""

import ctypes
import os
import re
import resource
import shutil
import struct
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

_NO_LIMIT = 1 << 60
_RECOMMENDED = "max_recommended_working_set_size"
_MIN_MARGIN, _MAX_MARGIN = 10**9, 4 * 10**9


def memory_bytes() -> int:
    """Return the bytes that this process may use: those of the GPU, or of a CPU's machine.

    Limits of a container (cgroup) and of the process (`ulimit -v`) count too.
    """
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [host, *_cgroup_limits(), resource.getrlimit(resource.RLIMIT_AS)[0]]
    if mx.default_device().type == mx.gpu:
        info = mx.device_info()
        # A Mac that works with more memory than it recommends begins to swap.
        names = ("memory_size", "total_memory", _RECOMMENDED)
        limits += [int(info[name]) for name in names if name in info]
    return min(limit for limit in limits if 0 < limit < _NO_LIMIT)


def most_copied_bytes() -> int:
    """Return the most memory for bfloat16 copies of a model's weights: an eighth of all.

    A larger model has no copies.
    """
    return memory_bytes() // 8


@dataclass(frozen=True)
class MemoryLimits:
    """Bytes that mlx may keep wired, keep cached after they are freed, and use at all."""

    wired: int
    cache: int
    used: int

    @classmethod
    def of_a_mac(cls, recommended: int, in_use: int) -> "MemoryLimits":
        """Return the limits for a model of `in_use` bytes, where the device recommends so much.

        The model is wired with a quarter more, but a tenth of what the device recommends stays for
        others. The cache takes at most half of what the model leaves.
        """
        margin = min(max(in_use // 4, _MIN_MARGIN), _MAX_MARGIN)
        return cls(
            wired=min(in_use + margin, recommended * 9 // 10),
            cache=max(recommended - in_use, 0) // 2,
            used=recommended,
        )


@contextmanager
def keep_memory_in_bounds() -> Generator[None]:
    """Set mlx's limits on a Mac to those of the model in memory, until the block ends.

    Without a wired limit, macOS may page out weights between two steps. Other devices have no such
    limits.
    """
    recommended = mx.device_info().get(_RECOMMENDED)
    if recommended is None:
        yield
        return
    limits = MemoryLimits.of_a_mac(int(recommended), mx.get_active_memory())
    setters = [mx.set_memory_limit, mx.set_cache_limit, mx.set_wired_limit]
    values = [limits.used, limits.cache, limits.wired]
    before = [limit(value) for limit, value in zip(setters, values, strict=True)]
    try:
        yield
    finally:
        mx.synchronize()
        for limit, value in zip(setters, before, strict=True):
            limit(value)


@dataclass(frozen=True)
class MemoryPressure:
    """The bytes that all programs have in swap, and whether macOS warns of memory pressure."""

    swapped: int
    warned: bool = False

    @classmethod
    def now(cls) -> "MemoryPressure":
        """Return the pressure of this moment."""
        if sys.platform == "darwin":
            return cls.of_mac(
                _sysctl("vm.swapusage"), _sysctl("kern.memorystatus_vm_pressure_level")
            )
        return cls.of_meminfo(Path("/proc/meminfo").read_text())

    @classmethod
    def of_mac(cls, swap_usage: bytes, pressure_level: bytes) -> "MemoryPressure":
        """Return what macOS says: total, free and used bytes of swap, and the level of pressure."""
        _, _, swapped = struct.unpack_from("=QQQ", swap_usage.ljust(24, b"\0"))
        (level,) = struct.unpack_from("=i", pressure_level.ljust(4, b"\0"))
        # 1 is normal, 2 a warning and 4 critical.
        return cls(swapped, warned=level > 1)

    @classmethod
    def of_meminfo(cls, text: str) -> "MemoryPressure":
        """Return what Linux says in /proc/meminfo."""
        kilobytes = {name: int(size) for name, size in re.findall(r"(Swap\w+):\s+(\d+)", text)}
        return cls(1024 * (kilobytes.get("SwapTotal", 0) - kilobytes.get("SwapFree", 0)))


def _sysctl(name: str) -> bytes:
    """Return a value that macOS knows by this name, or nothing if it knows none."""
    value, size = ctypes.create_string_buffer(64), ctypes.c_size_t(64)
    failed = ctypes.CDLL(None).sysctlbyname(
        name.encode(), value, ctypes.byref(size), None, ctypes.c_size_t(0)
    )
    return b"" if failed else value.raw[: size.value]


def with_busy_note(time: str) -> str:
    """Return the words about a time, with a sentence if programs keep half of the cores busy.

    The load is the mean number of programs that computed in the last minute.
    """
    try:
        load = os.getloadavg()[0]
    except OSError:
        return time
    cores = os.cpu_count() or 1
    if load < cores / 2:
        return time
    busy = f"The machine is busy now (load {load:.1f} on {cores} cores), so this time may change"
    return f"{time}. {busy}"


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
