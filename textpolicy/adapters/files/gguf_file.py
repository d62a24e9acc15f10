"""Reading GGUF files, the files of llama.cpp, with checks: metadata and tensors."""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from textpolicy.errors import UnreadableError
from textpolicy.untrusted.bounds import MAX_TENSORS

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT_KEY = "general.alignment"
_MAX_ALIGNMENT = 2**16
_MAX_AXES = 4
_BOOL, _STRING, _ARRAY = 7, 8, 9
# The numbers of the types of values, and how Python's struct spells them.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
# Of each type of tensor: the weights in a block, and the bytes of a block.
_F32, _F16, _Q8_0, _BF16 = 0, 1, 8, 30
_BLOCKS = {_F32: (1, 4), _F16: (1, 2), _Q8_0: (32, 34), _BF16: (1, 2)}
_TYPE_NAMES = "F32, F16, BF16 and Q8_0"


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """A tensor in a file. Axes are in numpy's order, which is the reverse of the file's."""

    shape: tuple[int, ...]
    number_type: int
    content: memoryview

    def read(self) -> mx.array:
        """Return the tensor in float32, apart from the file."""
        match self.number_type:
            case 0:
                values = np.frombuffer(self.content, "<f4")
            case 1:
                values = np.frombuffer(self.content, "<f2").astype(np.float32)
            case 30:
                values = _widened_bfloat16(np.frombuffer(self.content, "<u2"))
            case _:
                values = _unpacked_q8_0(np.frombuffer(self.content, np.uint8))
        return mx.array(values.reshape(self.shape))


@dataclass(frozen=True, slots=True)
class GGUFContent:
    """The metadata and the tensors of a file, by their names."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]


def is_gguf(start: bytes) -> bool:
    """Return whether a file that starts with these bytes says that it is a GGUF file."""
    return start[: len(_MAGIC)] == _MAGIC


def parse_gguf(content: memoryview) -> GGUFContent:
    """Return what is in a file, without a copy of the tensors.

    Raise `UnreadableError`, which does not name the file, if the content is damaged.
    """
    reader = _Reader(content)
    if not is_gguf(bytes(reader.take(len(_MAGIC)))):
        raise UnreadableError("it does not start with GGUF")
    if (version := reader.number("I")) not in _VERSIONS:
        raise UnreadableError(f"its version is {version}; versions {_VERSIONS} are read")
    # Each tensor and each value takes more than 8 bytes, so the size of the file bounds both.
    tensor_count, value_count = reader.count(MAX_TENSORS), reader.count(len(content) // 8)
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = reader.text()
        if key in metadata:
            raise UnreadableError(f"{key!r} is there twice")
        metadata[key] = reader.value(reader.number("I"))
    places = _read_places(reader, tensor_count)
    alignment = metadata.get(_ALIGNMENT_KEY, 32)
    if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT:
        raise UnreadableError(f"its alignment is {alignment!r}")
    start = -(-reader.position // alignment) * alignment
    return GGUFContent(metadata, _slice_tensors(content, start, alignment, places))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor is: `offset` counts from the first tensor."""

    shape: tuple[int, ...]
    number_type: int
    offset: int


class _Reader:
    """A position in the bytes of a file. Reading beyond the end raises `UnreadableError`."""

    def __init__(self, content: memoryview) -> None:
        self.content = content
        self.position = 0

    def take(self, size: int) -> memoryview:
        """Return the next bytes."""
        end = self.position + size
        if end > len(self.content):
            raise UnreadableError(f"it ends at byte {len(self.content):,}, inside its header")
        taken, self.position = self.content[self.position : end], end
        return taken

    def number(self, kind: str) -> Any:
        """Return the next number of a kind of Python's struct."""
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def count(self, limit: int) -> int:
        """Return the next count of parts."""
        if (count := self.number("Q")) > limit:
            raise UnreadableError(f"it counts {count:,} parts, more than fit into it")
        return count

    def text(self) -> str:
        """Return the next text."""
        try:
            return str(self.take(self.number("Q")), "utf-8")
        except UnicodeDecodeError as error:
            raise UnreadableError(f"a text in it is not UTF-8: {error.reason}") from error

    def value(self, kind: int) -> Any:
        """Return the next value of the metadata."""
        if kind == _STRING:
            return self.text()
        if kind == _BOOL:
            return self.number("B") != 0
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _ARRAY:
            return self._array(self.number("I"))
        raise UnreadableError(f"a value in it has the unknown type {kind}")

    def _array(self, kind: int) -> list[Any]:
        count = self.count(len(self.content))
        if kind in _NUMBERS:
            format = f"<{count}{_NUMBERS[kind]}"
            return list(struct.unpack(format, self.take(struct.calcsize(format))))
        if kind not in (_STRING, _BOOL):
            raise UnreadableError(f"a list in it has parts of type {kind}")
        return [self.value(kind) for _ in range(count)]


def _read_places(reader: _Reader, count: int) -> dict[str, _Place]:
    places: dict[str, _Place] = {}
    for _ in range(count):
        name = reader.text()
        axes = reader.number("I")
        if name in places or not 0 < axes <= _MAX_AXES:
            raise UnreadableError(f"the tensor {name!r} is there twice or has {axes} axes")
        shape = tuple(reversed([reader.number("Q") for _ in range(axes)]))
        places[name] = _Place(shape, reader.number("I"), reader.number("Q"))
    return places


def _slice_tensors(
    content: memoryview, start: int, alignment: int, places: Mapping[str, _Place]
) -> dict[str, GGUFTensor]:
    """Return the tensors. Raise `UnreadableError` if they do not fit into the file side by side."""
    tensors: dict[str, GGUFTensor] = {}
    free = 0
    for name, place in sorted(places.items(), key=lambda item: item[1].offset):
        if place.number_type not in _BLOCKS:
            raise UnreadableError(
                f"the tensor {name!r} has numbers of type {place.number_type}; only {_TYPE_NAMES} "
                "are read"
            )
        weights, block_bytes = _BLOCKS[place.number_type]
        size = math.prod(place.shape) // weights * block_bytes
        end = start + place.offset + size
        if not size or place.shape[-1] % weights or place.offset < free or place.offset % alignment:
            raise UnreadableError(f"the tensor {name!r} has a wrong shape or a wrong place")
        if end > len(content):
            raise UnreadableError(f"it has {len(content):,} bytes, and {name!r} ends at {end:,}")
        free = place.offset + size
        part = content[start + place.offset : end]
        tensors[name] = GGUFTensor(place.shape, place.number_type, part)
    return tensors


def _widened_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _unpacked_q8_0(content: np.ndarray) -> np.ndarray:
    """Return the weights: a block has a float16 scale and 32 whole numbers of a byte."""
    blocks = content.reshape(-1, 34)
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    return scales * np.ascontiguousarray(blocks[:, 2:]).view(np.int8)
