"""A line plot as SVG text: no library, no resource from elsewhere, readable in every browser."""

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 320, 64, 16, 16, 40
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#8250df")


def line_plot(lines: Mapping[str, Points], *, x: str, y: str) -> str:
    """The lines by name over one pair of axes; points that are not finite are left out."""
    finite = {
        name: [p for p in points if math.isfinite(p[0]) and math.isfinite(p[1])]
        for name, points in lines.items()
    }
    drawn = {name: points for name, points in finite.items() if points}
    every = [point for points in drawn.values() for point in points] or [(0.0, 0.0)]
    across = _Axis(LEFT, WIDTH - RIGHT, [point[0] for point in every])
    up = _Axis(HEIGHT - BOTTOM, TOP, [point[1] for point in every])
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" xmlns="http://www.w3.org/2000/svg" '
        f'font-family="sans-serif" font-size="12" aria-label="{escape(y)} over {escape(x)}">',
        *_grid(across, up),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x, "middle"),
        _text(4, TOP - 4, y, "start"),
    ]
    for number, (name, points) in enumerate(drawn.items()):
        colour = COLOURS[number % len(COLOURS)]
        parts += _line(points, across, up, colour)
        parts.append(_text(WIDTH - RIGHT, TOP + 16 * (number + 1), name, "end", colour))
    return "\n".join([*parts, "</svg>"])


class _Axis:
    """From values to places, and the round values to write beside them."""

    def __init__(self, start: float, end: float, values: Sequence[float]) -> None:
        low, high = min(values), max(values)
        if low == high:
            low, high = low - 0.5, high + 0.5
        self._start, self._end, self._low, self._high = start, end, low, high

    def place(self, value: float) -> float:
        share = (value - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        """About five round values."""
        rough = (self._high - self._low) / 5
        power = 10 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        first = math.ceil(self._low / step)
        return [n * step for n in range(first, math.floor(self._high / step) + 1)]


def _grid(across: _Axis, up: _Axis) -> list[str]:
    parts: list[str] = []
    for value in up.ticks():
        at = up.place(value)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>'
        )
        parts.append(_text(LEFT - 6, at + 4, f"{value:.4g}", "end"))
    for value in across.ticks():
        parts.append(_text(across.place(value), HEIGHT - BOTTOM + 18, f"{value:.6g}", "middle"))
    return parts


def _line(points: Points, across: _Axis, up: _Axis, colour: str) -> list[str]:
    places = [(across.place(x), up.place(y)) for x, y in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>']
    if len(places) <= 40:
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in places]
    return parts


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#444") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} fill="{colour}">{escape(text)}</text>'
