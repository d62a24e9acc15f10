"""`textpolicy doctor`: the versions, the device and the measured speed of this installation."""

import os
import platform
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

from textpolicy import backend, fast_cpu
from textpolicy.cli.answer import Answer, table
from textpolicy.cli.output import print_note
from textpolicy.cli.progress import showing_progress
from textpolicy.device_sizes import device_sizes, saturating_rows
from textpolicy.experiment.threads import ONE_IS_FASTER
from textpolicy.fast_cpu.mlx_operations import reason_of_none
from textpolicy.machine import memory_bytes, size_text

_NO_RAY = "not installed; rollout workers on other machines need: pip install 'textpolicy[ray]'"
_TINY = Path(backend.__file__).parent / "tiny" / "model.safetensors"
_INSTALL = "pip install --force-reinstall textpolicy mlx-lm"


def run(options: Namespace) -> Answer:
    with showing_progress(print_note):
        return _run(options)


def _run(options: Namespace) -> Answer:
    blas, threads = fast_cpu.enable(), fast_cpu.measure_threads()
    device = mx.default_device().type.name
    data = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        **backend.versions(),
        "device": device,
        "device_name": str(mx.device_info().get("device_name", "unknown")),
        "blas": asdict(blas) | {"gflops": round(fast_cpu.measure_gflops(), 1)},
        "no_compiled_operations": reason_of_none() if device == "cpu" else "",
        "threads": asdict(threads) if threads else None,
        "memory_bytes": memory_bytes(),
        "sizes": asdict(device_sizes()) | asdict(saturating_rows()),
        "tiny_model": _TINY.is_file(),
        "ray": backend.version_of("ray"),
    }
    data["usable"] = bool(data["mlx-lm"]) and data["tiny_model"]
    data["next"] = "textpolicy demo" if data["usable"] else _INSTALL
    return Answer(data=data, text=_for_people(data), exit_code=0 if data["usable"] else 1)


def _threads_text(threads: Mapping[str, float] | None) -> Iterator[str]:
    if threads is None:
        return
    count, speed, alone = threads["of_a_run"], threads["gflops"], threads["gflops_of_one"]
    yield f"a run takes {count} of {os.cpu_count()} cores: {speed} GFLOP/s; one thread: {alone}"
    if alone > speed:
        yield ONE_IS_FASTER


def _size_rows(sizes: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield how much this device gets at once, and how that was found."""
    head = sizes["head_chunk_bytes"] / 2**20
    yield (
        "sizes",
        f"micro-batches of {sizes['micro_batch_tokens']:,} tokens, {sizes['decoding_rows']:,} rows "
        f"decoded together, prompts read by {sizes['prefill_tokens']:,} tokens, logits by "
        f"{head:g} MiB",
    )
    yield (
        "",
        f"from the memory and the {sizes['rows']:,} rows with which products are fastest, "
        f"{sizes['source']}",
    )


def _compiled_text(blas: Mapping[str, Any], no_operations: str) -> str:
    if not blas["few_rows"]:
        reason = blas["few_rows_reason"]
        return f"a C compiler would make decoding of few rows faster: {reason}" if reason else ""
    if no_operations:
        return f"exponentials are mlx's own, which are slower: {no_operations}"
    return "loops compiled for this processor multiply few rows and compute other functions"


def _for_people(data: Mapping[str, Any]) -> str:
    blas = data["blas"]
    compiled = _compiled_text(blas, data["no_compiled_operations"])
    rows = [
        ("python", f"{data['python']} on {data['platform']}"),
        ("textpolicy", data["textpolicy"] or "runs from its sources, not installed"),
        ("mlx", data["mlx"] or "version unknown"),
        ("mlx-lm", data["mlx-lm"] or "MISSING: pip install mlx-lm"),
        ("device", f"{data['device']} ({data['device_name']})"),
        ("memory", size_text(data["memory_bytes"])),
        *_size_rows(data["sizes"]),
        ("CPU products", f"{blas['name']}: {blas['gflops']} GFLOP/s in float32"),
        *(("", text) for text in _threads_text(data["threads"])),
        *(("", note) for note in (blas["reason"], blas["hint"], compiled) if note),
        ("tiny model", "present" if data["tiny_model"] else f"MISSING: no {_TINY}; reinstall"),
        ("ray", data["ray"] or _NO_RAY),
        ("verdict", "ready" if data["usable"] else "not usable yet"),
        ("next", data["next"]),
    ]
    return table(rows)
