"""`textpolicy doctor`: the versions, the device and the measured speed of this installation."""

import platform
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

from textpolicy import backend, fast_cpu
from textpolicy.cli.answer import Answer, table
from textpolicy.machine import memory_bytes, size_text

_TINY = Path(backend.__file__).parent / "tiny" / "model.safetensors"


def run(options: Namespace) -> Answer:
    blas = fast_cpu.enable()
    data = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        **backend.versions(),
        "device": mx.default_device().type.name,
        "device_name": str(mx.device_info().get("device_name", "unknown")),
        "blas": asdict(blas) | {"gflops": round(fast_cpu.measure_gflops(), 1)},
        "memory_bytes": memory_bytes(),
        "tiny_model": _TINY.is_file(),
    }
    data["usable"] = bool(data["mlx-lm"]) and data["tiny_model"]
    return Answer(data=data, text=_for_people(data), exit_code=0 if data["usable"] else 1)


def _for_people(data: Mapping[str, Any]) -> str:
    blas = data["blas"]
    threads = f", {blas['threads']} threads" if blas["threads"] else ""
    rows = [
        ("python", f"{data['python']} on {data['platform']}"),
        ("textpolicy", data["textpolicy"] or "runs from its sources, not installed"),
        ("mlx", data["mlx"] or "version unknown"),
        ("mlx-lm", data["mlx-lm"] or "MISSING: pip install mlx-lm"),
        ("device", f"{data['device']} ({data['device_name']})"),
        ("memory", size_text(data["memory_bytes"])),
        ("CPU products", f"{blas['name']}: {blas['gflops']} GFLOP/s in float32{threads}"),
        *(("", note) for note in (blas["reason"], blas["hint"]) if note),
        ("tiny model", "present" if data["tiny_model"] else f"MISSING: no {_TINY}; reinstall"),
        ("verdict", "ready: try `textpolicy demo`" if data["usable"] else "not usable yet"),
    ]
    return table(rows)
