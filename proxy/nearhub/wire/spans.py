"""Half-open byte spans, sets of them, and block arithmetic. Pure; no HTTP here (see ranges.py)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

BLOCK = 8 * 1024 * 1024
"""Bytes of a block: the aligned unit of durable storage."""


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Bytes start ≤ i < stop."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"not a span: [{self.start}, {self.stop})")

    def __len__(self) -> int:
        return self.stop - self.start

    def __bool__(self) -> bool:
        return self.stop > self.start

    def __contains__(self, position: int) -> bool:
        return self.start <= position < self.stop

    def overlap(self, other: Span) -> Span:
        """The bytes in both; empty (at a bound of self) where there are none."""
        start = min(max(self.start, other.start), self.stop)
        return Span(start, max(start, min(self.stop, other.stop)))


class SpanSet:
    """A set of bytes, kept as sorted, disjoint, non-touching spans."""

    __slots__ = ("_starts", "_stops")

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        for span in spans:
            self.add(span)

    def add(self, span: Span) -> None:
        if not span:
            return
        # Everything that overlaps or touches [start, stop) melts into one.
        first = bisect_left(self._stops, span.start)
        last = bisect_right(self._starts, span.stop)
        start, stop = span.start, span.stop
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def end_of_run(self, position: int) -> int:
        """Where the run of present bytes that starts at `position` ends; `position` itself when it is absent."""
        i = bisect_right(self._starts, position) - 1
        if i >= 0 and position < self._stops[i]:
            return self._stops[i]
        return position

    def covers(self, span: Span) -> bool:
        return not span or self.end_of_run(span.start) >= span.stop

    def missing(self, within: Span) -> Iterator[Span]:
        """The absent spans inside `within`, in order."""
        position = within.start
        i = bisect_right(self._stops, position)
        while position < within.stop:
            if i == len(self._starts) or self._starts[i] >= within.stop:
                yield Span(position, within.stop)
                return
            if self._starts[i] > position:
                yield Span(position, self._starts[i])
            position = self._stops[i]
            i += 1

    def count(self) -> int:
        """How many bytes are in the set."""
        return sum(self._stops) - sum(self._starts)

    def copy(self) -> SpanSet:
        other = SpanSet()
        other._starts, other._stops = self._starts[:], self._stops[:]
        return other

    def __iter__(self) -> Iterator[Span]:
        return (Span(a, b) for a, b in zip(self._starts, self._stops, strict=True))

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SpanSet) and self._starts == other._starts and self._stops == other._stops

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "{" + ", ".join(f"[{s.start}, {s.stop})" for s in self) + "}"


def block_count(size: int, block: int) -> int:
    """How many blocks a blob of `size` bytes has; an empty blob has none."""
    return -(-size // block)


def block_span(index: int, size: int, block: int) -> Span:
    """The bytes of block `index`; the last one may be short."""
    return Span(index * block, min(size, (index + 1) * block))


def blocks_touching(span: Span, block: int) -> range:
    """Indices of the blocks that hold a byte of `span`."""
    if not span:
        return range(0)
    return range(span.start // block, block_count(span.stop, block))


def blocks_inside(span: Span, size: int, block: int) -> range:
    """Indices of the blocks that lie wholly in `span`; a short last block counts when its end is reached."""
    first = block_count(span.start, block)
    last = block_count(size, block) if span.stop >= size else span.stop // block
    return range(first, max(first, last))


def block_end(position: int, size: int, block: int) -> int:
    """End of the block that holds `position`."""
    return min(size, (position // block + 1) * block)
