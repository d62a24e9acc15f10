"""Describe the machine and the versions that a benchmark ran on, for its record."""

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
    """Return machine and versions. `threads` is None where mlx chooses the number of threads."""
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
    """Return the system's name of the processor, or the architecture if there is no name."""
    name = None
    if platform.system() == "Linux":
        name = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        name = name and name[1]
    elif platform.system() == "Darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    return name or platform.processor() or platform.machine()


def on_gpu() -> bool:
    """Return whether mlx computes on a GPU."""
    return mx.default_device().type == mx.gpu


def default_dtype() -> str:
    """Return the dtype of random weights: bfloat16 on a GPU, float32 on a CPU."""
    return "bfloat16" if on_gpu() else "float32"


def device() -> str:
    """Return the kind of device that mlx computes on, and the name of a GPU."""
    kind = mx.default_device().type.name
    return kind if kind == "cpu" else f"{kind}, {mx.device_info()['device_name']}"
