"""Curves and bars as SVG text, for a page without scripts. Pure.

Colours and type are the page's, by class. A long series is drawn by the smallest and largest value of each of many buckets,
in the order in which they came: no peak is lost, and none is made up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 24
"""Around the plot, in pixels of the drawing."""

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Series:
    """`style`: its class. `has_dots`: each point is shown, with its value on hovering."""

    name: str
    style: str
    points: Sequence[Point]
    has_dots: bool = False


@dataclass(frozen=True, slots=True)
class Frame:
    """From data to pixels: x from `low_x` to `high_x`, y likewise."""

    width: int
    height: int
    low_x: float
    high_x: float
    low_y: float
    high_y: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.low_x) / (self.high_x - self.low_x) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return TOP + (self.high_y - value) / (self.high_y - self.low_y) * (self.height - TOP - BOTTOM)


def thin(points: Sequence[Point], buckets: int) -> list[Point]:
    """At most 2 · `buckets` + 2 of `points`: the lowest and highest of each bucket, the first and the last."""
    if len(points) <= 2 * buckets:
        return list(points)
    kept = {0, len(points) - 1}
    for bucket in range(buckets):
        part = range(bucket * len(points) // buckets, (bucket + 1) * len(points) // buckets)
        kept |= {min(part, key=lambda index: points[index][1]), max(part, key=lambda index: points[index][1])}
    return [points[index] for index in sorted(kept)]


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers from `low` to `high`, about `wanted` of them."""
    raw = (high - low) / max(1, wanted)
    scale = 10.0 ** math.floor(math.log10(raw))
    step = scale * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * scale >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number in a few characters."""
    if not value:
        return "0"
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(value) >= scale:
            return f"{value / (1e3 if unit == 'k' else scale):.3g}{unit}"
    if abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"


def curves(
    series: Sequence[Series],
    *,
    label: str,
    width: int = 460,
    height: int = 200,
    starts_at_zero: bool = False,
    mark: tuple[float, str] | None = None,
    line: tuple[float, str] | None = None,
    say: Callable[[float], str] = short,
) -> str:
    """An SVG of `series` over one x axis. `mark`: a vertical line at an x, with words; `line`: a horizontal one."""
    drawn = [one for one in series if one.points]
    frame = _frame(drawn, width, height, starts_at_zero)
    parts = [_axes(frame, "step", say)]
    notes = []
    if line is not None and frame.low_y <= line[0] <= frame.high_y:
        y = frame.y(line[0])
        parts.append(f'<path class="limit" d="M{LEFT} {y:.1f}H{width - RIGHT}"/>')
        notes.append(f'<text class="note" x="{width - RIGHT}" y="{y - 4:.1f}" text-anchor="end">{escape(line[1])}</text>')
    for one in drawn:
        points = thin(one.points, (width - LEFT - RIGHT) // 2)
        places = " ".join(f"{frame.x(x):.2f},{frame.y(y):.2f}" for x, y in points)
        parts.append(f'<polyline class="{one.style}" points="{places}"/>')
        if one.has_dots and len(points) <= 200:
            parts += [
                f'<circle class="{one.style}" cx="{frame.x(x):.2f}" cy="{frame.y(y):.2f}" r="2.5">'
                f"<title>{escape(one.name)}, {x:g}: {say(y)}</title></circle>"
                for x, y in points
            ]
    if mark is not None:
        x = frame.x(mark[0])
        is_right = x > width / 2
        parts.append(f'<path class="mark" d="M{x:.1f} {TOP}V{height - BOTTOM}"/>')
        notes.append(
            f'<text class="note" x="{x + (-5 if is_right else 5):.1f}" y="{TOP + 9}" '
            f'text-anchor="{"end" if is_right else "start"}">{escape(mark[1])}</text>'
        )
    return _svg(width, height, label, [*parts, *notes])


def bars(counts: Sequence[tuple[int, int, int]], *, label: str, width: int = 460, height: int = 170) -> str:
    """An SVG of a histogram: (lowest, highest, how many) of each bar, side by side."""
    most = max(count for _, _, count in counts)
    frame = Frame(width, height, counts[0][0], counts[-1][1] + 1, 0.0, most * 1.06)
    parts = [_axes(frame, "", short)]
    for low, high, count in counts:
        left, right, top = frame.x(low), frame.x(high + 1), frame.y(count)
        gap = min(1.0, (right - left) / 4)
        parts.append(
            f'<rect class="bar" x="{left:.2f}" y="{top:.2f}" width="{right - left - gap:.2f}" '
            f'height="{height - BOTTOM - top:.2f}"><title>{low} to {high}: {count:,}</title></rect>'
        )
    return _svg(width, height, label, parts)


def bins(lengths: Sequence[tuple[int, int]], most: int = 32) -> list[tuple[int, int, int]]:
    """(lowest, highest, how many) of at most `most` bins of one width. `lengths`: (length, how many have it), ascending."""
    low, high = lengths[0][0], lengths[-1][0]
    width = -(-(high - low + 1) // most)
    counts = [0] * (-(-(high - low + 1) // width))
    for length, count in lengths:
        counts[(length - low) // width] += count
    return [(low + place * width, low + (place + 1) * width - 1, count) for place, count in enumerate(counts)]


def _frame(series: Sequence[Series], width: int, height: int, starts_at_zero: bool) -> Frame:
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    low, high = (min(0.0, *ys) if starts_at_zero else min(ys)), max(ys)
    room = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    low_x, high_x = min(xs), max(xs)
    return Frame(
        width, height, low_x, high_x if high_x > low_x else low_x + 1, low if starts_at_zero else low - room, high + room
    )


def _axes(frame: Frame, unit: str, say: Callable[[float], str]) -> str:
    parts = []
    for value in ticks(frame.low_y, frame.high_y, max(3, frame.height // 48)):
        y = frame.y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{frame.width - RIGHT}"/>')
        parts.append(f'<text class="y" x="{LEFT - 8}" y="{y + 3.5:.1f}" text-anchor="end">{escape(say(value))}</text>')
    for value in ticks(frame.low_x, frame.high_x, max(3, frame.width // 110)):
        if value == int(value):
            parts.append(
                f'<text class="x" x="{frame.x(value):.1f}" y="{frame.height - 6}" text-anchor="middle">{short(value)}</text>'
            )
    parts.append(f'<text class="unit" x="{LEFT - 8}" y="{frame.height - 6}" text-anchor="end">{escape(unit)}</text>')
    base = frame.height - BOTTOM
    parts.append(f'<path class="axis" d="M{LEFT} {base}H{frame.width - RIGHT}"/>')
    return "".join(parts)


def _svg(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
