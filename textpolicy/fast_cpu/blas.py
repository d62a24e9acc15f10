"""A fast matrix product on Linux CPUs: OpenBLAS in place of the BLAS inside mlx's wheel.

The Linux wheel of mlx carries netlib's reference BLAS, which is some 30 times slower than OpenBLAS.
`libmlx.so` calls it through three pointers in its table of imported functions. `enable` lets these
pointers point to OpenBLAS, compares products with numpy's, and restores the pointers if a product
differs. Products of few rows then go to the loops of `few_rows.c`, in the same way. Outside this
process nothing changes, but that the compiled loops are kept. The environment variable
`TEXTPOLICY_BLAS=off` keeps mlx's BLAS; `TEXTPOLICY_BLAS=/path/lib.so` names another library, one
with 32-bit integers.
"""

import ctypes
import itertools
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from textpolicy.errors import ConfigError
from textpolicy.fast_cpu.compiler import NotCompiled, once
from textpolicy.fast_cpu.few_rows import load_product, share_threads
from textpolicy.fast_cpu.function_table import NotReplaced, replace_functions

_STOCK = "mlx's own (netlib reference)"
_PRODUCTS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
_SHAPES = ((64, 64, 64), (33, 130, 17), (3, 300, 170))
# How long idle OpenBLAS threads poll for the next product before they sleep, as a power of two of
# processor ticks. OpenBLAS' own value of 26 takes tens of milliseconds from mlx's threads.
_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
_TIMEOUT = ("OPENBLAS_THREAD_TIMEOUT", "16")


@dataclass(frozen=True, kw_only=True)
class BlasStatus:
    """Which library multiplies matrices on the CPU, why, and how to get a faster one.

    `few_rows` says whether compiled loops multiply matrices of few rows, with the reason if not.
    """

    name: str
    fast: bool
    threads: int | None = None  # None where their number cannot be set
    reason: str = ""
    hint: str = ""
    few_rows: bool = False
    few_rows_reason: str = ""


def enable() -> BlasStatus:
    """Switch to the fastest BLAS that is installed; return the BLAS in use and its thread count.

    The first call decides for the process. Where mlx's BLAS stays, the status says why.
    """
    status, openblas = _choose_once()
    if openblas is None:
        return status
    return replace(status, threads=_function(openblas, "openblas_get_num_threads")())


def set_threads(count: int) -> None:
    """Multiply with `count` threads from now on; raise ConfigError where the BLAS has no setting.

    One thread is best for small models and on a busy machine: OpenBLAS waits for the slowest of its
    threads, and a product of a few microseconds gains nothing from a second thread.
    """
    status, openblas = _choose_once()
    if openblas is None:
        raise ConfigError(f"the threads of {status.name} cannot be set; leave out --threads")
    _function(openblas, "openblas_set_num_threads")(count)
    if status.few_rows:
        _share_threads(openblas, count)


def default_threads() -> int | None:
    """Return the threads of a run: one fewer than OpenBLAS takes, if it takes more than two.

    OpenBLAS waits for the slowest of its threads, so a core that another program uses slows the
    threads on all cores down. None means that the number cannot be set.
    """
    _, openblas = _choose_once()
    if openblas is None:
        return None
    if any(name in os.environ for name in _THREAD_VARIABLES):
        return enable().threads
    return threads_beside_others(_function(openblas, "openblas_get_num_procs")())


def threads_beside_others(cores: int) -> int:
    """Return the threads that leave room on so many cores. Half of two would be too few."""
    return cores - 1 if cores > 2 else cores


def measure_gflops(n: int = 1024) -> float:
    """Return the billions of float32 operations a second of an n x n product on the CPU."""
    matrix = mx.random.normal((n, n), key=mx.random.key(0), stream=mx.cpu)
    mx.eval(matrix)
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < 10 and sum(seconds) < 0.3):
        start = time.perf_counter()
        mx.eval(mx.matmul(matrix, matrix, stream=mx.cpu))
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds) / 1e9


@dataclass(frozen=True, kw_only=True)
class ThreadSpeeds:
    """The threads of a run, and the GFLOP/s of products with them and with one, measured now."""

    of_a_run: int
    gflops: float
    gflops_of_one: float

    @property
    def is_one_faster(self) -> bool:
        """Whether other programs use so much of the machine that one thread is faster."""
        return self.gflops_of_one > self.gflops


def measure_threads() -> ThreadSpeeds | None:
    """Return the speeds of products; None if the number of threads cannot be set."""
    default, before = default_threads(), enable().threads
    if default is None or before is None:
        return None
    speeds: list[float] = []
    for count in (default, 1):
        set_threads(count)
        speeds.append(round(measure_gflops(), 1))
    set_threads(before)
    return ThreadSpeeds(of_a_run=default, gflops=speeds[0], gflops_of_one=speeds[1])


@once
def _choose_once() -> tuple[BlasStatus, ctypes.CDLL | None]:
    """Return the BLAS that this process uses from now on, and its library if it is an OpenBLAS."""
    if sys.platform != "linux":
        reason = "only mlx on Linux needs another BLAS"
        return BlasStatus(name="the platform's own", fast=True, reason=reason), None
    setting = os.environ.get("TEXTPOLICY_BLAS", "")
    if setting == "off":
        return BlasStatus(name=_STOCK, fast=False, reason="TEXTPOLICY_BLAS=off"), None
    try:
        library = _load(setting)
        pointers = {
            name: ctypes.cast(_function(library, name), ctypes.c_void_p) for name in _PRODUCTS
        }
        addresses = {name: pointer.value or 0 for name, pointer in pointers.items()}
        _use(addresses)
    except (NotReplaced, OSError) as error:
        hint = _hint_for(mx.default_device())
        return BlasStatus(name=_STOCK, fast=False, reason=str(error), hint=hint), None
    config = _config(library)
    name = " ".join(config.split()[:2]) or Path(library._name).name
    status = BlasStatus(name=name, fast=True, reason=f"{library._name} agrees with numpy")
    if not config:
        return status, None
    reason = _use_few_rows(library, addresses["cblas_sgemm"])
    return replace(status, few_rows=not reason, few_rows_reason=reason), library


def _use_few_rows(library: ctypes.CDLL, others: int) -> str:
    """Let mlx multiply matrices of few rows by compiled loops; return why it cannot, or ""."""
    count = _function(library, "openblas_get_num_threads")
    address = ctypes.cast(count, ctypes.c_void_p).value or 0
    try:
        product = load_product(others, address)
        _share_threads(library, count())
        _use({"cblas_sgemm": product})
    except (NotReplaced, NotCompiled) as error:
        return str(error)
    return ""


def _share_threads(openblas: ctypes.CDLL, count: int) -> None:
    with suppress(NotReplaced):  # Older libraries have no such function.
        share_threads(_function(openblas, "openblas_set_threads_callback_function"), count)


def _hint_for(device: Any) -> str:
    # The library alone: textpolicy[cpu] would install mlx's CPU backend over that of CUDA.
    hint = "pip install scipy-openblas32 brings an OpenBLAS some 30 times faster"
    return "" if device.type.name == "gpu" else hint


def _load(setting: str) -> ctypes.CDLL:
    name, value = _TIMEOUT
    given = os.environ.get(name)
    os.environ[name] = given or value
    try:
        library = ctypes.CDLL(setting or _find_openblas())
    finally:
        if given is None:
            # OpenBLAS has read the variable when it started. Child processes do not inherit it.
            del os.environ[name]
    if "USE64BITINT" in _config(library):
        raise NotReplaced(f"{library._name} takes 64-bit integers; mlx passes 32-bit ones")
    return library


def _find_openblas() -> str:
    """Return the path of the OpenBLAS in a Python package, or the name of the system's OpenBLAS."""
    try:
        import scipy_openblas32 as wheel
    except ImportError:
        return "libopenblas.so.0"
    return os.path.join(wheel.get_lib_dir(), wheel.get_library(fullname=True))


def _function(library: ctypes.CDLL, name: str) -> Any:
    for prefix in ("scipy_", ""):
        with suppress(AttributeError):
            return library[prefix + name]
    raise NotReplaced(f"{library._name} has no {name}")


def _config(library: ctypes.CDLL) -> str:
    """Return OpenBLAS' description of itself, or an empty text for any other library."""
    try:
        config = _function(library, "openblas_get_config")
    except NotReplaced:
        return ""
    config.restype = ctypes.c_char_p
    return config().decode()


def _use(functions: Mapping[str, int]) -> None:
    """Let mlx call these functions; restore the old ones and raise if a product is wrong."""
    before = replace_functions(functions)
    if wrong := _wrong_product():
        replace_functions(before)
        raise NotReplaced(f"undone: it gave a wrong {wrong}")


def _wrong_product() -> str:
    """Return the first product that mlx computes wrongly on the CPU, or an empty text."""
    # Fresh numbers each time: memory that a product left unwritten could hold an older, right one.
    rng = np.random.default_rng()
    dtypes = {np.float32: mx.float32, np.float64: mx.float64, np.complex64: mx.complex64}
    with mx.stream(mx.cpu):
        for dtype, (rows, inner, columns) in itertools.product(dtypes, _SHAPES):
            left, right = rng.normal(size=(inner, rows)), rng.normal(size=(columns, inner))
            a, b = (mx.array(x.astype(dtype), dtype=dtypes[dtype]).T for x in (left, right))
            for x, y in itertools.product((a, mx.contiguous(a)), (b, mx.contiguous(b))):
                if not np.allclose(np.array(x @ y), left.T @ right.T, rtol=1e-3, atol=1e-3):
                    return f"{dtype.__name__} product of {rows}x{inner} and {inner}x{columns}"
    return ""
