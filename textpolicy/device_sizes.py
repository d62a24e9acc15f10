"""The sizes of the work that this device gets at once: tokens, rows and bytes of a forward pass.

A device computes at its highest rate only if the products of matrices have enough rows. CPUs need
few. A GPU is timed once, and a file in the user's cache folder keeps the number of rows that the
GPU needs. `DeviceSizes.of` turns this number and the memory into sizes.

The sizes decide in which order numbers are added, and so the last digits of a run. A run keeps its
sizes in `config.toml`, and all its processes work with these.
"""

import json
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, replace
from functools import cache
from hashlib import sha256
from math import floor, log2
from pathlib import Path
from statistics import median
from threading import Lock
from typing import ClassVar

import mlx.core as mx

from textpolicy.backend import version_of
from textpolicy.config.train import HeadSizeOptions
from textpolicy.errors import UnreadableError, UnwritableError
from textpolicy.fast_cpu.cache_folder import cache_folder
from textpolicy.file_writing import atomic_replace
from textpolicy.machine import memory_bytes
from textpolicy.untrusted.parsing import read_json_object

_CPU_ROWS = 256
"""Rows with which products on a CPU reach their highest rate. CPUs need no more than this."""
_FEWEST_ROWS, _MOST_ROWS = 64, 8192
_MEMORY = 5 * 10**9
"""The least memory for the sizes of a CPU. A Mac of 8 GB has so much for its GPU."""
_SMALLEST_SHARE = 1 / 8
# Of the measurement: the width of a square matrix, the products that are computed together, the
# repetitions, and the seconds after which no product of more rows is timed.
_WIDTH, _PRODUCTS, _REPETITIONS, _SECONDS = 1024, 8, 5, 0.5
_NEARLY_ALL = 0.9
_ONE_AT_A_TIME = Lock()


@dataclass(frozen=True, kw_only=True)
class DeviceSizes:
    """How much a device computes at once, where a caller names no other number."""

    micro_batch_tokens: int = 1024
    """Tokens of a micro-batch, with their padding."""
    decoding_rows: int = 256
    """Rows that decode together."""
    prefill_tokens: int = 2048
    """Prompt tokens, over all rows, that one forward pass reads."""
    head_chunk_bytes: int = 16 * 2**20
    """Float32 logits of a chunk of the output head. Softmax, gradient and the memory that mlx
    allocates ahead for the next chunk take about twelve times as much."""

    @classmethod
    def of(cls, saturating_rows: int, memory: int) -> "DeviceSizes":
        """Return the sizes of a device that reaches its highest rate with so many rows.

        A device with 256 rows or fewer, such as a CPU, gets the defaults of this class. With twice
        the rows, the sizes are twice as large, if the memory is too. The memory that a decoding row
        takes grows with its text, which may have many turns, so decoding rows grow with the square
        root of the memory. With less memory than `_MEMORY`, all sizes are smaller. All factors are
        powers of two, so that a somewhat different measurement gives the same sizes.
        """
        doublings = floor(log2(memory / _MEMORY))
        work = 2.0 ** max(0, floor(log2(saturating_rows / _CPU_ROWS)))
        share = max(_SMALLEST_SHARE, min(work, 2.0**doublings))
        rows = max(_SMALLEST_SHARE, min(work, 2.0 ** (min(doublings, doublings // 2))))
        return replace(cls()._scaled(share), decoding_rows=int(rows * cls.decoding_rows))

    @property
    def halved(self) -> "DeviceSizes":
        """Half of each size that is above its default, but not less than the default."""
        pairs = zip(asdict(self).items(), astuple(DeviceSizes()), strict=True)
        return DeviceSizes(
            **{name: max(min(size, least), size // 2) for (name, size), least in pairs}
        )

    def _scaled(self, factor: float) -> "DeviceSizes":
        return DeviceSizes(**{name: int(factor * size) for name, size in asdict(self).items()})


def device_sizes() -> DeviceSizes:
    """Return the sizes that this process works with, by default those of the device."""
    with _InUse.lock:
        sizes = next(reversed(_InUse.blocks.values()), _InUse.of_process)
    return sizes or DeviceSizes.of(saturating_rows().rows, memory_bytes())


def sizes_of(options: HeadSizeOptions) -> DeviceSizes:
    """Return the sizes of a run with these options: those of the device where none is set."""
    given = {name: size for name, size in asdict(options).items() if size is not None}
    return replace(device_sizes(), **given)


def use_sizes(sizes: DeviceSizes | None) -> None:
    """Let all threads of this process work with these sizes, or with those of the device again.

    While a block of `using_sizes` lasts, its sizes count.
    """
    _InUse.of_process = sizes


@contextmanager
def using_sizes(sizes: DeviceSizes) -> Generator[None]:
    """Let all threads of this process work with these sizes until the block ends.

    Blocks of several threads may end in any order. Of those that have not ended, the sizes of the
    one that began last count.
    """
    block = object()
    with _InUse.lock:
        _InUse.blocks[block] = sizes
    try:
        yield
    finally:
        with _InUse.lock:
            del _InUse.blocks[block]


class _InUse:
    of_process: DeviceSizes | None = None
    blocks: ClassVar[dict[object, DeviceSizes]] = {}  # in the order in which they began
    lock = Lock()


@dataclass(frozen=True)
class SaturatingRows:
    """The rows of a product with which the device nearly reaches its highest rate.

    `source` says in words where the number comes from.
    """

    rows: int
    source: str


def saturating_rows() -> SaturatingRows:
    """Return the rows that the default device needs: known for a CPU, measured once for a GPU.

    A CPU is not timed, so that its sizes are the same however busy the machine is.
    """
    if mx.default_device().type == mx.cpu:
        return SaturatingRows(_CPU_ROWS, "known for CPUs")
    with _ONE_AT_A_TIME:
        return _measured_once()


@cache
def _measured_once() -> SaturatingRows:
    name = str(mx.device_info().get("device_name", "GPU"))
    version = version_of("mlx") or "unknown"
    return read_or_measure({"device": name, "mlx": version}, measure_saturating_rows)


def read_or_measure(device: dict[str, str], measure: Callable[[], int]) -> SaturatingRows:
    """Return the rows that the device's file has, or else measure them and write the file.

    A file that cannot be read, or that is of another device, is written again. Without a folder to
    write in, each process measures.
    """
    try:
        path = cache_folder() / f"device-{_digest(device)}.json"
    except (OSError, RuntimeError) as error:
        return SaturatingRows(measure(), f"measured now, and not kept: {error}")
    known = _read_rows(path, device)
    if known is not None:
        return SaturatingRows(known, f"kept in {path}")
    rows = measure()
    try:
        with atomic_replace(path, private=True) as temporary:
            temporary.write_text(json.dumps({**device, "saturating_rows": rows}), "utf-8")
    except UnwritableError as error:
        return SaturatingRows(rows, f"measured now, and not kept: {str(error).splitlines()[0]}")
    return SaturatingRows(rows, f"measured now, and kept in {path}")


def _digest(device: dict[str, str]) -> str:
    return sha256(json.dumps(device, sort_keys=True).encode()).hexdigest()[:16]


def _read_rows(path: Path, device: dict[str, str]) -> int | None:
    try:
        content = read_json_object(path)
    except UnreadableError:
        return None
    rows = content.pop("saturating_rows", None)
    is_number = type(rows) is int and 0 < rows <= _MOST_ROWS
    return rows if is_number and content == device else None


def measure_saturating_rows(seconds_of: Callable[[int], float] | None = None) -> int:
    """Return the fewest rows, a power of two, with which the device nearly has its highest rate.

    `seconds_of` returns the seconds of a product of so many rows; by default products are timed.
    """
    seconds_of = seconds_of or _product_timer()
    rates: dict[int, float] = {}
    rows, started = _FEWEST_ROWS, time.perf_counter()
    while rows <= _MOST_ROWS and time.perf_counter() - started < _SECONDS:
        rates[rows] = rows / seconds_of(rows)
        rows *= 2
    return min(rows for rows, rate in rates.items() if rate >= _NEARLY_ALL * max(rates.values()))


def _product_timer() -> Callable[[int], float]:
    dtype = mx.float32 if mx.default_device().type == mx.cpu else mx.bfloat16
    matrix = mx.ones((_WIDTH, _WIDTH), dtype)

    def seconds_of(rows: int) -> float:
        inputs = [mx.ones((rows, _WIDTH), dtype) for _ in range(_PRODUCTS)]
        mx.eval(matrix, inputs)
        times: list[float] = []
        # The first products prepare what the others find ready.
        while len(times) < 2 or (len(times) <= _REPETITIONS and sum(times) < _SECONDS / 8):
            started = time.perf_counter()
            mx.eval([one @ matrix for one in inputs])
            times.append(time.perf_counter() - started)
        return median(times[1:]) / _PRODUCTS

    return seconds_of
