"""What the numbers of a record were measured on: every script here puts it in what it writes."""

import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from textpolicy import fast_cpu


def setting() -> dict[str, Any]:
    """Machine and versions; the threads are those that products take now, None if mlx decides."""
    blas = fast_cpu.enable()
    packages = ("textpolicy", "mlx", "mlx-lm")
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "processor": processor(),
        "device": device(),
        "blas": blas.name,
        "threads": blas.threads,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def processor() -> str:
    """As the system calls it; the architecture where it has no name for it."""
    name = None
    if platform.system() == "Linux":
        name = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        name = name and name[1]
    elif platform.system() == "Darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    return name or platform.processor() or platform.machine()


def device() -> str:
    """What mlx computes on, a GPU with its name."""
    kind = mx.default_device().type.name
    return kind if kind == "cpu" else f"{kind}, {mx.device_info()['device_name']}"
