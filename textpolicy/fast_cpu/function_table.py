"""Where libmlx.so keeps the addresses of the functions it imports, and how to put others there."""

import ctypes
import mmap
import platform
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class BlasNotReplaced(Exception):
    """This process keeps the BLAS it has; the message says why."""


def replace_functions(functions: Mapping[str, int]) -> dict[str, int]:
    """Write these addresses into libmlx.so's table; returns those that were there."""
    mappings = _mappings()
    image = next((m for m in mappings if m.path.name == "libmlx.so" and m.offset == 0), None)
    if image is None:
        raise BlasNotReplaced("this mlx has no libmlx.so")
    imported = _imported(image.path)
    if missing := sorted(functions.keys() - imported.keys()):
        raise BlasNotReplaced(f"{image.path} does not import {', '.join(missing)}")
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
    raise BlasNotReplaced("the function table of libmlx.so is not where its relocations say")


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
        raise BlasNotReplaced(f"{platform.machine()} processors are not known here")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as image:
            return dict(_relocations(image, _FUNCTION_TYPES[platform.machine()]))
    except (ValueError, IndexError, struct.error) as error:
        raise BlasNotReplaced(f"{path} is not an ELF library of a known shape: {error}") from None


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
