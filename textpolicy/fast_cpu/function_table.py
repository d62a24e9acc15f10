"""The table in which a library of mlx keeps the addresses of the functions that it imports."""

import ctypes
import mmap
import platform
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# In an ELF file: the type of a section of relocations, and by processor the relocation types
# JUMP_SLOT and GLOB_DAT, which fill the table of imported functions.
_RELOCATIONS = 4
_FUNCTION_TYPES = {"x86_64": (7, 6), "aarch64": (1026, 1025)}


LIBMLX = "libmlx.so"


class NotReplaced(Exception):
    """mlx keeps the functions that it has; the message gives the reason."""


def replace_functions(functions: Mapping[str, int], library: str = LIBMLX) -> dict[str, int]:
    """Write these addresses into the library's table; return the addresses that were there.

    `library` is the name, or the path, of a file that this process has loaded.
    """
    pointers, table, code = _find_pointers(functions.keys(), library)
    before = {name: pointer.value for name, pointer in pointers.items()}
    for address in before.values():
        _mapping_of([address], code)
    # One call opens all of the table before the first write: never half a table.
    _protect(table, mmap.PROT_READ | mmap.PROT_WRITE)
    for name, pointer in pointers.items():
        pointer.value = functions[name]
    if "w" not in table.permissions:
        _protect(table, mmap.PROT_READ)
    return before


def imported_functions(library: str) -> Collection[str]:
    """Return the names of the functions that a loaded library imports."""
    return _imported(_image(_mappings(), library).path).keys()


def _find_pointers(
    names: Collection[str], library: str
) -> tuple[dict[str, ctypes.c_uint64], "_Mapping", list["_Mapping"]]:
    """Return each function's pointer, the mapping that holds all of them, and mappings of code."""
    mappings = _mappings()
    image = _image(mappings, library)
    imported = _imported(image.path)
    if missing := sorted(set(names) - imported.keys()):
        raise NotReplaced(f"{image.path} does not import {', '.join(missing)}")
    addresses = {name: image.start + imported[name] for name in names}
    table = _mapping_of(addresses.values(), [m for m in mappings if m.path == image.path])
    pointers = {name: ctypes.c_uint64.from_address(at) for name, at in addresses.items()}
    return pointers, table, [m for m in mappings if "x" in m.permissions]


def _image(mappings: Iterable["_Mapping"], library: str) -> "_Mapping":
    """Return the first mapping of a loaded library."""
    named = (m for m in mappings if library in (m.path.name, str(m.path)))
    image = next((m for m in named if m.offset == 0), None)
    if image is None:
        raise NotReplaced(f"this mlx has no {library}")
    return image


@dataclass(frozen=True)
class _Mapping:
    """One line of /proc/self/maps: a range of addresses and its permissions."""

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
    """Return the mapping that holds all the addresses; raise if no mapping does."""
    for mapping in mappings:
        if mapping.start <= min(addresses) and max(addresses) < mapping.end:
            return mapping
    raise NotReplaced("the function table is not where the library's relocations say")


def _protect(mapping: _Mapping, protection: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    size = ctypes.c_size_t(mapping.end - mapping.start)
    if libc.mprotect(ctypes.c_void_p(mapping.start), size, protection) != 0:
        raise OSError(ctypes.get_errno(), "the function table of mlx cannot be opened")


def _imported(path: Path) -> dict[str, int]:
    """Return the offset in a shared library at which it keeps each imported function's address."""
    if platform.machine() not in _FUNCTION_TYPES:
        raise NotReplaced(f"{platform.machine()} processors are not supported")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as image:
            return dict(_relocations(image, _FUNCTION_TYPES[platform.machine()]))
    except (ValueError, IndexError, struct.error) as error:
        raise NotReplaced(f"{path} is not an ELF library of a known shape: {error}") from None


def _relocations(image: mmap.mmap, types: tuple[int, int]) -> Iterator[tuple[str, int]]:
    """Yield the name and the offset of the pointer of every imported function."""
    if image[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a little-endian 64-bit ELF file")
    (start,), (count,) = struct.unpack_from("<Q", image, 40), struct.unpack_from("<H", image, 60)
    headers = image[start : start + 64 * count]
    if len(headers) < 64 * count:
        raise ValueError("its section headers are missing")
    # Name, type, flags, address, offset, size, link to another section, and three more numbers.
    sections = list(struct.iter_unpack("<IIQQQQIIQQ", headers))
    for _, kind, _, _, offset, size, link, *_ in sections:
        if kind != _RELOCATIONS:
            continue
        _, _, _, _, symbols, _, strings_link, *_ = sections[link]
        _, _, _, _, strings, strings_size, *_ = sections[strings_link]
        names = image[strings : strings + strings_size]
        for pointer, type_, symbol, _ in struct.iter_unpack("<QIIq", image[offset : offset + size]):
            if type_ in types:
                (name,) = struct.unpack_from("<I", image, symbols + 24 * symbol)
                yield names[name : names.index(b"\0", name)].decode(), pointer
