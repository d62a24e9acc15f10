"""The curve of a run as a PNG picture, which every page shows beside its text.

Model pages of the hub show PNG files of a repository; whether they show SVG files depends on how
the page loads the file.
"""

import math
import struct
import zlib
from collections.abc import Sequence

import numpy as np

_Points = Sequence[tuple[float, float]]
_WIDTH, _HEIGHT = 720, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 16, 36
_INK, _GRID = (90, 90, 90), (225, 225, 225)
_COLORS = ((38, 103, 186), (214, 106, 30))
_TICKS = 5
# Five rows of each character. Each row is a number of three bits.
_FONT = {
    "0": (7, 5, 5, 5, 7),
    "1": (2, 6, 2, 2, 7),
    "2": (7, 1, 7, 4, 7),
    "3": (7, 1, 7, 1, 7),
    "4": (5, 5, 7, 1, 1),
    "5": (7, 4, 7, 1, 7),
    "6": (7, 4, 7, 5, 7),
    "7": (7, 1, 1, 1, 1),
    "8": (7, 5, 7, 5, 7),
    "9": (7, 5, 7, 1, 7),
    ".": (0, 0, 0, 0, 2),
    "-": (0, 0, 7, 0, 0),
    "+": (0, 2, 7, 2, 0),
    "e": (0, 7, 7, 4, 7),
}
_PIXEL = 2


def draw_curves(curves: Sequence[_Points]) -> bytes:
    """Return a PNG file with up to two curves, the first one blue and the second one orange.

    Points are steps and finite values; every curve has at least one.
    """
    image = np.full((_HEIGHT, _WIDTH, 3), 255, dtype=np.uint8)
    xs, ys = (_range([point[axis] for curve in curves for point in curve]) for axis in (0, 1))
    for value in _ticks(*ys):
        row = round(_place(value, ys, _HEIGHT - _BOTTOM, _TOP))
        image[row, _LEFT : _WIDTH - _RIGHT] = _GRID
        _write(image, f"{value:g}", right=_LEFT - 8, middle=row)
    for value in _ticks(*xs):
        column = round(_place(value, xs, _LEFT, _WIDTH - _RIGHT))
        image[_HEIGHT - _BOTTOM : _HEIGHT - _BOTTOM + 5, column] = _INK
        text = f"{value:g}"
        _write(image, text, right=column + _text_width(text) // 2, middle=_HEIGHT - _BOTTOM + 18)
    for curve, color in zip(curves, _COLORS, strict=False):
        _draw(image, curve, xs, ys, color)
    return _png(image)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    # A span of the size of rounding has no round numbers in it.
    size = max(abs(low), abs(high))
    return (low, high) if high - low > 1e-9 * size else (low - 0.5 - size, high + 0.5 + size)


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers from `low` to `high`, at distances of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [number * step for number in range(first, last + 1)]


def _place(value: float, span: tuple[float, float], start: float, end: float) -> float:
    return start + (value - span[0]) / (span[1] - span[0]) * (end - start)


def _draw(
    image: np.ndarray,
    curve: _Points,
    xs: tuple[float, float],
    ys: tuple[float, float],
    color: tuple[int, int, int],
) -> None:
    """Draw the lines between the points, a pixel and its neighbours below and right at a time."""
    columns = [_place(x, xs, _LEFT, _WIDTH - _RIGHT - 1) for x, _ in curve]
    rows = [_place(y, ys, _HEIGHT - _BOTTOM - 1, _TOP) for _, y in curve]
    # One point is a line to itself.
    for start in range(max(1, len(curve) - 1)):
        end = min(start + 1, len(curve) - 1)
        length = max(abs(columns[end] - columns[start]), abs(rows[end] - rows[start]))
        count = int(length) + 2
        along = np.linspace(columns[start], columns[end], count).round().astype(int)
        down = np.linspace(rows[start], rows[end], count).round().astype(int)
        for more_down, more_along in ((0, 0), (1, 0), (0, 1), (1, 1)):
            image[down + more_down, along + more_along] = color


def _text_width(text: str) -> int:
    return 4 * _PIXEL * len(text)


def _write(image: np.ndarray, text: str, *, right: int, middle: int) -> None:
    """Write a number that ends at the column `right`; what does not fit is cut."""
    for place, char in enumerate(text):
        column = right - _text_width(text) + 4 * _PIXEL * place
        for line, bits in enumerate(_FONT[char]):
            row = middle + (line - 2) * _PIXEL - _PIXEL // 2
            for bit in range(3):
                left = column + bit * _PIXEL
                if bits & (4 >> bit) and left >= 0:
                    image[row : row + _PIXEL, left : left + _PIXEL] = _INK


def _png(image: np.ndarray) -> bytes:
    """Return the file: signature, header, compressed rows each after a filter byte of 0, end."""
    height, width, _ = image.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), image.reshape(height, -1)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
