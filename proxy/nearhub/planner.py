"""Which bytes to ask an upstream for next. Pure: what is there, who waits for what, what is under way → orders.

Rules, in this order:
1. The first missing byte of each reader is asked for at once: from it to the end of its block, or of a few when they come fast.
2. Then what is wanted, nearest to a reader first, in spans of a few blocks, as far as connections allow.
3. A span that a reader waits for and that has been silent is asked for a second time (a hedge).
An order never overlaps what is there or under way, hedges excepted: each byte crosses the WAN once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from nearhub.wire.spans import BLOCK, Span, SpanSet, block_end

READ_AHEAD = 32 * 1024 * 1024
"""Bytes that a Range wants beyond itself (P4)."""
SMALL_BLOB = 16 * 1024 * 1024
"""Blobs up to this size never wait behind bulk traffic."""
MAX_ORDER_BLOCKS = 8
ORDER_S = 1.0
"""An order should take about this long, so that connections come free for readers elsewhere."""


class Lane(Enum):
    """Upstream connections are kept apart, so that short transfers never wait for long ones."""

    BULK = "bulk"
    EXPRESS = "express"
    METADATA = "metadata"
    PREFETCH = "prefetch"
    """A part of the bulk lane: what nobody reads yet never has more of it."""


@dataclass(frozen=True, slots=True)
class Need:
    """One reader: it is at `position` and will read on to `stop`."""

    position: int
    stop: int


@dataclass(frozen=True, slots=True)
class Flight:
    """A request under way: it has written up to `position` and will go on to `stop`."""

    position: int
    stop: int
    silent_s: float = 0.0
    """Seconds since its last byte."""
    is_hedged: bool = False


@dataclass(frozen=True, slots=True)
class Order:
    span: Span
    lane: Lane
    is_hedge: bool = False


def order_blocks(bytes_per_s: float, block: int = BLOCK) -> int:
    """Blocks in one bulk order, from the measured rate of one connection; 1 when nothing is known yet."""
    return max(1, min(MAX_ORDER_BLOCKS, int(bytes_per_s * ORDER_S / block)))


def wanted_by_range(span: Span, size: int, block: int = BLOCK) -> Span:
    """What a Range wants: its whole blocks, and READ_AHEAD. A read that reaches the end wants nothing beyond."""
    return Span(span.start // block * block, block_end(min(size, span.stop + READ_AHEAD) - 1, size, block))


def plan(
    *,
    size: int,
    written: SpanSet,
    wanted: SpanSet,
    needs: Sequence[Need],
    flights: Sequence[Flight],
    room: int,
    span_blocks: int = 1,
    block: int = BLOCK,
    hedge_after_s: float = 3.0,
) -> list[Order]:
    """New orders. `room` is how many more bulk requests this blob may have; urgent ones go by the express lane beyond it."""
    covered = written.copy()
    for flight in flights:
        covered.add(Span(flight.position, flight.stop))
    is_small = size <= SMALL_BLOB
    orders: list[Order] = []

    def take(span: Span, lane: Lane) -> None:
        orders.append(Order(span, Lane.EXPRESS if is_small else lane))
        covered.add(span)

    for start in _unique(_first_missing(written, need) for need in needs):
        if start is None or covered.end_of_run(start) > start:
            continue
        stop = min(size, (start // block + span_blocks) * block)
        span = next(_gaps(covered, wanted, Span(start, stop)), Span(start, stop))
        take(span, Lane.BULK if room > 0 else Lane.EXPRESS)
        room -= 1
    while room > 0 and (start := _nearest_gap(covered, wanted, needs)) is not None:
        stop = min(size, (start // block + span_blocks) * block)
        take(next(_gaps(covered, wanted, Span(start, stop))), Lane.BULK)
        room -= 1
    orders.extend(_hedges(needs, written, flights, hedge_after_s))
    return orders


def _first_missing(written: SpanSet, need: Need) -> int | None:
    start = written.end_of_run(need.position)
    return start if start < need.stop else None


def _unique(starts: Iterable[int | None]) -> Iterable[int | None]:
    return dict.fromkeys(starts)


def _nearest_gap(covered: SpanSet, wanted: SpanSet, needs: Sequence[Need]) -> int | None:
    """Start of the wanted, uncovered run that a reader will come to soonest; else of the lowest one."""
    best: tuple[int, int] | None = None
    for need in dict.fromkeys(needs):
        gap = next(_gaps(covered, wanted, Span(need.position, max(need.position, need.stop))), None)
        if gap is not None:
            best = min(best or (gap.start - need.position, gap.start), (gap.start - need.position, gap.start))
    if best is not None:
        return best[1]
    lowest = next(_gaps(covered, wanted, None), None)
    return None if lowest is None else lowest.start


def _gaps(covered: SpanSet, wanted: SpanSet, within: Span | None) -> Iterator[Span]:
    """Runs of wanted, uncovered bytes, in order."""
    for span in wanted:
        yield from covered.missing(span if within is None else span.overlap(within))


def _hedges(needs: Sequence[Need], written: SpanSet, flights: Sequence[Flight], after_s: float) -> list[Order]:
    waited_for = {_first_missing(written, need) for need in needs}
    return [
        Order(Span(flight.position, flight.stop), Lane.EXPRESS, is_hedge=True)
        for flight in flights
        if flight.silent_s >= after_s
        and not flight.is_hedged
        and flight.stop > flight.position
        and any(start is not None and flight.position <= start < flight.stop for start in waited_for)
    ]


def goes_on_orphaned(*, size: int, present: int, whole: bool, orphan_limit: int) -> bool:
    """Whether a fill whose last reader left goes on (P4). `present` and `orphan_limit` in bytes."""
    missing = size - present
    return whole and (present * 2 >= size or missing <= orphan_limit)
