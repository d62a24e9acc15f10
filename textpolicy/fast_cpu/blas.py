"""A fast matrix product on Linux CPUs: OpenBLAS in place of the BLAS inside mlx's wheel.

The Linux wheel of mlx carries netlib's reference BLAS, some 30 times slower than OpenBLAS.
`libmlx.so` reaches it through three pointers in its table of imported functions. `enable` points
them at OpenBLAS, compares products with numpy's, and puts the pointers back if one differs.
Nothing outside this process changes. `TEXTPOLICY_BLAS=off` keeps mlx's own;
`TEXTPOLICY_BLAS=/path/lib.so` names another library, one whose integers have 32 bits.
"""

import ctypes
import itertools
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from textpolicy.errors import ConfigError
from textpolicy.fast_cpu.symbol_table import Declined, point

_STOCK = "mlx's own (netlib reference)"
_HINT = "pip install scipy-openblas32 brings an OpenBLAS some 30 times faster"
_PRODUCTS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
_SHAPES = ((64, 64, 64), (33, 130, 17))
# How long OpenBLAS' threads look out for the next product before they sleep, in powers of two of
# the processor's ticks. They do it in the way of mlx's and Python's threads, for tens of
# milliseconds as it comes (26).
_WAIT = ("OPENBLAS_THREAD_TIMEOUT", "16")


@dataclass(frozen=True, kw_only=True)
class Blas:
    """What multiplies matrices on the CPU, why this one, and how to get a faster one."""

    name: str
    fast: bool
    threads: int | None = None
    reason: str = ""
    hint: str = ""


@cache
def enable() -> Blas:
    """Multiply with the fastest BLAS at hand from now on. Never raises: the record says why not.

    The choice is made once a process, before or after `mlx.core` is imported.
    """
    if sys.platform != "linux":
        return Blas(name="the platform's own", fast=True, reason="only mlx on Linux needs another")
    if _setting() == "off":
        return Blas(name=_STOCK, fast=False, reason="TEXTPOLICY_BLAS=off")
    try:
        import mlx.core as mx  # loads libmlx.so
    except ImportError as error:
        return Blas(name="none", fast=False, reason=f"mlx cannot be imported: {error}")
    try:
        library = _load(_setting())
        _use({name: _address(library, name) for name in _PRODUCTS})
    except (Declined, OSError) as declined:
        hint = _hint_for(mx.default_device())
        return Blas(name=_STOCK, fast=False, reason=str(declined), hint=hint)
    return _describe(library)


def status() -> Blas:
    """The BLAS that this process uses, and its threads as they are now."""
    blas = enable()
    if blas.threads is None:
        return blas
    return replace(blas, threads=_function(_load(_setting()), "openblas_get_num_threads")())


def use_threads(count: int) -> None:
    """Multiply with `count` threads from now on.

    One is best for small models and on a busy machine: OpenBLAS waits for the slowest of its
    threads, and a product that is done in microseconds gains nothing by being handed out.
    """
    if status().threads is None:
        raise ConfigError(f"the threads of {status().name} cannot be set; expected an OpenBLAS")
    _function(_load(_setting()), "openblas_set_num_threads")(count)


def measure_gflops(n: int = 1024) -> float:
    """Billions of float32 operations a second in an n x n product on the CPU, best of a few."""
    import mlx.core as mx

    matrix = mx.random.normal((n, n), key=mx.random.key(0), stream=mx.cpu)
    mx.eval(matrix)
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < 10 and sum(seconds) < 0.3):
        start = time.perf_counter()
        mx.eval(mx.matmul(matrix, matrix, stream=mx.cpu))
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds) / 1e9


def _hint_for(device: Any) -> str:
    # The library alone: textpolicy[cpu] would install mlx's CPU backend over that of CUDA.
    return "" if device.type.name == "gpu" else _HINT


def _setting() -> str:
    return os.environ.get("TEXTPOLICY_BLAS", "")


@cache
def _load(setting: str) -> ctypes.CDLL:
    name, value = _WAIT
    own = name not in os.environ
    os.environ.setdefault(name, value)
    try:
        library = ctypes.CDLL(setting) if setting else _load_openblas()
    finally:
        if own:
            # Read once, when the library starts; processes started from here choose for themselves.
            del os.environ[name]
    if "USE64BITINT" in _config(library):
        raise Declined(f"{library._name} takes 64-bit integers; mlx passes 32-bit ones")
    return library


def _load_openblas() -> ctypes.CDLL:
    try:
        import scipy_openblas32 as wheel
    except ImportError:
        pass
    else:
        return ctypes.CDLL(os.path.join(wheel.get_lib_dir(), wheel.get_library(fullname=True)))
    try:
        return ctypes.CDLL("libopenblas.so.0")
    except OSError:
        raise Declined("neither scipy-openblas32 nor a system OpenBLAS is installed") from None


def _function(library: ctypes.CDLL, name: str) -> Any:
    for prefix in ("scipy_", ""):
        try:
            return library[prefix + name]
        except AttributeError:
            continue
    raise Declined(f"{library._name} has no {name}")


def _address(library: ctypes.CDLL, name: str) -> int:
    return ctypes.cast(_function(library, name), ctypes.c_void_p).value or 0


def _config(library: ctypes.CDLL) -> str:
    """OpenBLAS' own description of itself; empty for any other library."""
    try:
        config = _function(library, "openblas_get_config")
    except Declined:
        return ""
    config.restype = ctypes.c_char_p
    return config().decode()


def _describe(library: ctypes.CDLL) -> Blas:
    config = _config(library)
    return Blas(
        name=" ".join(config.split()[:2]) or Path(library._name).name,
        fast=True,
        threads=_function(library, "openblas_get_num_threads")() if config else None,
        reason=f"{library._name} agrees with numpy",
    )


def _use(functions: Mapping[str, int]) -> None:
    """Point mlx at these functions, or leave it as it was and say which product was wrong."""
    before = point(functions)
    if wrong := _wrong_product():
        point(before)
        raise Declined(f"undone: it gave a wrong {wrong}")


def _wrong_product() -> str:
    """The first product that mlx gets wrong on the CPU; empty if none."""
    import mlx.core as mx

    # Fresh numbers each time: memory that a product left unwritten could hold an older, right one.
    rng = np.random.default_rng()
    dtypes = {np.float32: mx.float32, np.float64: mx.float64, np.complex64: mx.complex64}
    with mx.stream(mx.cpu):
        for dtype, (rows, inner, columns) in itertools.product(dtypes, _SHAPES):
            left, right = rng.normal(size=(inner, rows)), rng.normal(size=(columns, inner))
            a, b = (mx.array(x.astype(dtype), dtype=dtypes[dtype]).T for x in (left, right))
            for x, y in ((a, b), (mx.contiguous(a), mx.contiguous(b))):
                if not np.allclose(np.array(x @ y), left.T @ right.T, rtol=1e-3, atol=1e-3):
                    return f"{dtype.__name__} product of {rows}x{inner} and {inner}x{columns}"
    return ""
