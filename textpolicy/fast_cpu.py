"""A fast matrix product on Linux CPUs: OpenBLAS in place of the BLAS inside mlx's wheel.

The Linux wheel of mlx carries netlib's reference BLAS, some 30 times slower than OpenBLAS.
`libmlx.so` reaches it through three pointers in its table of imported functions. `enable` points
them at OpenBLAS, compares products with numpy's, and puts the pointers back if one differs.
Nothing outside this process changes. `TEXTPOLICY_BLAS=off` keeps mlx's own;
`TEXTPOLICY_BLAS=/path/lib.so` names another library, one whose integers have 32 bits.
"""

import ctypes
import itertools
import mmap
import os
import platform
import struct
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from textpolicy.errors import ConfigError

_STOCK = "mlx's own (netlib reference)"
_HINT = "pip install scipy-openblas32 brings an OpenBLAS some 30 times faster"
_PRODUCTS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
_SHAPES = ((64, 64, 64), (33, 130, 17))


@dataclass(frozen=True, kw_only=True)
class Blas:
    """What multiplies matrices on the CPU, why this one, and how to get a faster one."""

    name: str
    fast: bool
    threads: int | None = None
    reason: str = ""
    hint: str = ""


class _Declined(Exception):
    """This process keeps the BLAS it has; the message says why."""


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
    except (_Declined, OSError) as declined:
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
    library = ctypes.CDLL(setting) if setting else _load_openblas()
    if "USE64BITINT" in _config(library):
        raise _Declined(f"{library._name} takes 64-bit integers; mlx passes 32-bit ones")
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
        raise _Declined("neither scipy-openblas32 nor a system OpenBLAS is installed") from None


def _function(library: ctypes.CDLL, name: str) -> Any:
    for prefix in ("scipy_", ""):
        try:
            return library[prefix + name]
        except AttributeError:
            continue
    raise _Declined(f"{library._name} has no {name}")


def _address(library: ctypes.CDLL, name: str) -> int:
    return ctypes.cast(_function(library, name), ctypes.c_void_p).value or 0


def _config(library: ctypes.CDLL) -> str:
    """OpenBLAS' own description of itself; empty for any other library."""
    try:
        config = _function(library, "openblas_get_config")
    except _Declined:
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
    before = _point(functions)
    if wrong := _wrong_product():
        _point(before)
        raise _Declined(f"undone: it gave a wrong {wrong}")


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


def _point(functions: Mapping[str, int]) -> dict[str, int]:
    """Write these addresses into libmlx.so's table; returns those that were there."""
    mappings = _mappings()
    image = next((m for m in mappings if m.path.name == "libmlx.so" and m.offset == 0), None)
    if image is None:
        raise _Declined("this mlx has no libmlx.so")
    imported = _imported(image.path)
    if missing := sorted(functions.keys() - imported.keys()):
        raise _Declined(f"{image.path} does not import {', '.join(missing)}")
    slots = {name: image.start + imported[name] for name in functions}
    place = _mapping_of(slots.values(), [m for m in mappings if m.path == image.path])
    pointers = {name: ctypes.c_uint64.from_address(slot) for name, slot in slots.items()}
    before = {name: pointer.value for name, pointer in pointers.items()}
    for address in before.values():
        _mapping_of([address], [m for m in mappings if "x" in m.permissions])
    # One call opens every slot before the first is written: never half a table.
    _protect(place, mmap.PROT_READ | mmap.PROT_WRITE)
    for name, pointer in pointers.items():
        pointer.value = functions[name]
    if "w" not in place.permissions:
        _protect(place, mmap.PROT_READ)
    return before


@dataclass(frozen=True)
class _Mapping:
    """One line of /proc/self/maps: a range of addresses and what may be done there."""

    start: int
    end: int
    permissions: str
    offset: int
    path: Path


def _mappings() -> list[_Mapping]:
    found: list[_Mapping] = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, permissions, offset, _, _, *path = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in addresses.split("-"))
        found.append(_Mapping(start, end, permissions, int(offset, 16), Path(*path)))
    return found


def _mapping_of(addresses: Collection[int], mappings: Iterable[_Mapping]) -> _Mapping:
    """The one mapping that holds all the addresses: nothing is read or called outside it."""
    for mapping in mappings:
        if mapping.start <= min(addresses) and max(addresses) < mapping.end:
            return mapping
    raise _Declined("the function table of libmlx.so is not where its relocations say")


def _protect(mapping: _Mapping, protection: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    start, size = ctypes.c_void_p(mapping.start), ctypes.c_size_t(mapping.end - mapping.start)
    if libc.mprotect(start, size, protection) != 0:
        raise OSError(ctypes.get_errno(), "the function table of libmlx.so cannot be opened")


_RELOCATIONS = 4
# The relocation types JUMP_SLOT and GLOB_DAT: those that fill the table of imported functions.
_FUNCTION_TYPES = {"x86_64": (7, 6), "aarch64": (1026, 1025)}


class _Section(NamedTuple):
    """A section header of a 64-bit ELF file."""

    name: int
    type: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    entry_size: int


def _imported(path: Path) -> dict[str, int]:
    """Where a shared library keeps the address of each function it imports, from its start."""
    if platform.machine() not in _FUNCTION_TYPES:
        raise _Declined(f"{platform.machine()} processors are not known here")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as image:
            return dict(_relocations(image, _FUNCTION_TYPES[platform.machine()]))
    except (ValueError, IndexError, struct.error) as error:
        raise _Declined(f"{path} is not an ELF library of a known shape: {error}") from None


def _relocations(image: mmap.mmap, types: tuple[int, int]) -> Iterator[tuple[str, int]]:
    """The name and the slot of every imported function."""
    if image[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a little-endian 64-bit ELF file")
    (start,), (count,) = struct.unpack_from("<Q", image, 40), struct.unpack_from("<H", image, 60)
    headers = image[start : start + 64 * count]
    if len(headers) < 64 * count:
        raise ValueError("its section headers are missing")
    sections = [_Section(*fields) for fields in struct.iter_unpack("<IIQQQQIIQQ", headers)]
    for section in sections:
        if section.type != _RELOCATIONS:
            continue
        symbols = sections[section.link]
        strings = sections[symbols.link]
        names = image[strings.offset : strings.offset + strings.size]
        table = image[section.offset : section.offset + section.size]
        for slot, kind, symbol, _ in struct.iter_unpack("<QIIq", table):
            if kind in types:
                (name,) = struct.unpack_from("<I", image, symbols.offset + 24 * symbol)
                yield names[name : names.index(b"\0", name)].decode(), slot
