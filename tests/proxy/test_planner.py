"""plan(): properties over random states, and fair simulations of whole fills: each wanted byte comes exactly once."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearhub.planner import (
    MAX_ORDER_BLOCKS,
    READ_AHEAD,
    SMALL_BLOB,
    Flight,
    Lane,
    Need,
    Order,
    goes_on_orphaned,
    order_blocks,
    plan,
    wanted_by_range,
)
from nearhub.wire.spans import BLOCK, Span, SpanSet, block_end

MIB = 1024 * 1024
GIB = 1024 * MIB


def is_disjoint(spans: list[Span]) -> bool:
    return all(left.stop <= right.start for left, right in itertools.pairwise(sorted(spans)))


def first_missing(written: SpanSet, need: Need) -> int | None:
    """What a reader waits for; found the slow way."""
    gap = next(written.missing(Span(need.position, max(need.position, need.stop))), None)
    return gap.start if gap else None


class State:
    """A random, legal state of a fill: segments of the blob are absent, written or under way; readers are anywhere."""

    def __init__(self, draw: st.DataObject) -> None:
        self.block = draw.draw(st.sampled_from([1 * MIB, 4 * MIB]), label="block")
        self.size = size = draw.draw(st.integers(1, 40 * MIB), label="size")
        self.span_blocks = draw.draw(st.integers(1, 4), label="span_blocks")
        self.room = draw.draw(st.integers(0, 6), label="room")
        spans = st.tuples(st.integers(0, size), st.integers(0, size)).map(lambda ends: Span(min(ends), max(ends)))
        self.needs = [Need(span.start, span.stop) for span in draw.draw(st.lists(spans, max_size=4), label="needs")]
        self.wanted = SpanSet(wanted_by_range(Span(need.position, need.stop), size, self.block) for need in self.needs)
        for span in draw.draw(st.lists(spans, max_size=2), label="also wanted"):
            self.wanted.add(wanted_by_range(span, size, self.block))
        self.written, self.flights = SpanSet(), list[Flight]()
        cuts = [0, *sorted(draw.draw(st.sets(st.integers(0, size), max_size=8), label="cuts")), size]
        for start, stop in itertools.pairwise(cuts):
            state = draw.draw(st.sampled_from(["absent", "written", "flying", "silent", "hedged"]))
            if state == "written":
                self.written.add(Span(start, stop))
            elif state != "absent":
                silent_s = 0.0 if state == "flying" else draw.draw(st.sampled_from([2.9, 3.0, 60.0]))
                self.flights.append(Flight(start, stop, silent_s, is_hedged=state == "hedged"))

    def plan(self) -> list[Order]:
        return plan(
            size=self.size,
            written=self.written,
            wanted=self.wanted,
            needs=self.needs,
            flights=self.flights,
            room=self.room,
            span_blocks=self.span_blocks,
            block=self.block,
        )


class TestOneRound:
    @given(st.data())
    def test_no_byte_is_ordered_that_is_there_or_under_way_or_unwanted(self, data: st.DataObject) -> None:
        """Orders overlap neither each other nor what is written nor flights, and keep to the blocks they may have."""
        state = State(data)
        orders = [order.span for order in state.plan() if not order.is_hedge]
        flying = [Span(f.position, f.stop) for f in state.flights]
        assert all(orders)
        assert is_disjoint(orders + flying + list(state.written))
        for span in orders:
            assert state.wanted.covers(span)
            assert span.stop <= (span.start // state.block + state.span_blocks) * state.block

    @given(st.data())
    def test_what_a_reader_waits_for_is_always_under_way(self, data: st.DataObject) -> None:
        """Even when no bulk request is allowed any more."""
        state = State(data)
        under_way = SpanSet(order.span for order in state.plan() if not order.is_hedge)
        for flight in state.flights:
            under_way.add(Span(flight.position, flight.stop))
        for need in state.needs:
            missing = first_missing(state.written, need)
            assert missing is None or under_way.covers(Span(missing, missing + 1))

    @given(st.data())
    def test_bulk_orders_never_exceed_the_room_and_only_readers_go_beyond_it(self, data: st.DataObject) -> None:
        state = State(data)
        orders = [order for order in state.plan() if not order.is_hedge]
        waited_for = {first_missing(state.written, need) for need in state.needs}
        assert sum(order.lane is Lane.BULK for order in orders) <= state.room
        assert len(orders) <= state.room or all(order.span.start in waited_for for order in orders)
        if state.size <= SMALL_BLOB:
            assert all(order.lane is Lane.EXPRESS for order in orders)
        elif len(orders) <= state.room:
            assert all(order.lane is Lane.BULK for order in orders)

    @given(st.data())
    def test_room_is_used_up_while_anything_is_wanted(self, data: st.DataObject) -> None:
        """No connection idles beside a missing byte."""
        state = State(data)
        orders = [order for order in state.plan() if not order.is_hedge]
        covered = SpanSet([*state.written, *(o.span for o in orders), *(Span(f.position, f.stop) for f in state.flights)])
        if len(orders) < state.room:
            assert all(covered.covers(span) for span in state.wanted)

    @given(st.data())
    def test_a_hedge_is_for_a_silent_unhedged_flight_that_a_reader_waits_for(self, data: st.DataObject) -> None:
        """Exactly those, once each, from where they are to their end, on the express lane."""
        state = State(data)
        waited_for = {first_missing(state.written, need) for need in state.needs} - {None}
        expected = [
            Order(Span(f.position, f.stop), Lane.EXPRESS, is_hedge=True)
            for f in state.flights
            if f.silent_s >= 3.0 and not f.is_hedged and any(f.position <= at < f.stop for at in waited_for if at is not None)
        ]
        assert [order for order in state.plan() if order.is_hedge] == expected


class Simulation:
    """A fill run by plan() alone, against an upstream that answers in random order and cuts some requests short."""

    def __init__(
        self, size: int, block: int, rng: random.Random, *, room: int, span_blocks: int = 1, cuts: bool = True
    ) -> None:
        self.size, self.block, self.rng, self.cuts = size, block, rng, cuts
        self.room, self.span_blocks = room, span_blocks
        self.written, self.wanted = SpanSet(), SpanSet()
        self.needs: list[Need] = []
        self.flights: list[Flight] = []
        self.began: list[Order] = []

    def join(self, span: Span) -> None:
        self.needs.append(Need(span.start, span.stop))
        self.wanted.add(wanted_by_range(span, self.size, self.block))

    @property
    def is_done(self) -> bool:
        return all(self.written.covers(span) for span in self.wanted)

    def step(self) -> None:
        """Order what the planner wants, then one request moves on."""
        room = self.room - len(self.flights)
        for order in plan(
            size=self.size,
            written=self.written,
            wanted=self.wanted,
            needs=self.needs,
            flights=self.flights,
            room=room,
            span_blocks=self.span_blocks,
            block=self.block,
        ):
            self.began.append(order)
            self.flights.append(Flight(order.span.start, order.span.stop))
        assert self.flights, "nothing is under way, although bytes are wanted"
        i = self.rng.randrange(len(self.flights))
        flight = self.flights.pop(i)
        to = flight.stop if self.rng.random() < 0.4 else self.rng.randint(flight.position, flight.stop)
        came = Span(flight.position, to)
        before = self.written.count()
        self.written.add(came)
        assert self.written.count() == before + len(came), "a byte crossed the WAN twice"
        if to < flight.stop and not (self.cuts and self.rng.random() < 0.2):
            self.flights.append(Flight(to, flight.stop))
        self.needs = [Need(min(n.stop, self.written.end_of_run(n.position)), n.stop) for n in self.needs]

    def run(self) -> None:
        for _ in range(5_000):
            if self.is_done:
                return
            self.step()
        raise AssertionError("the fill does not come to an end")


class TestWholeFills:
    @settings(max_examples=60)
    @given(st.randoms(use_true_random=False), st.integers(1, 40 * MIB), st.integers(1, 8), st.integers(1, 4))
    def test_each_wanted_byte_comes_exactly_once(self, rng: random.Random, size: int, room: int, span_blocks: int) -> None:
        """P2: any readers at any time, answers in any order, cut requests continued; in the end what was wanted is there,
        and nothing else."""
        fill = Simulation(size, 1 * MIB, rng, room=room, span_blocks=span_blocks)
        for _ in range(rng.randint(1, 6)):
            ends = sorted(rng.randint(0, size) for _ in range(2))
            fill.join(Span(0, size) if rng.random() < 0.3 else Span(*ends))
            for _ in range(rng.randint(0, 20)):
                if not fill.is_done:
                    fill.step()
        fill.run()
        assert fill.written == fill.wanted
        assert all(fill.written.covers(Span(need.position, need.stop)) for need in fill.needs)

    def test_two_hundred_readers_of_a_whole_blob_cost_it_once(self) -> None:
        fill = Simulation(40 * MIB, 8 * MIB, random.Random(1), room=4)
        for _ in range(200):
            fill.join(Span(0, fill.size))
        fill.run()
        assert fill.written.count() == fill.size

    @pytest.mark.parametrize("size", [20 * MIB, 24 * MIB, 24 * MIB + 1, 100 * MIB - 1])
    @pytest.mark.parametrize("length", [1, 8, 64 * 1024])
    def test_the_tail_of_a_blob_costs_no_more_than_its_blocks(self, size: int, length: int) -> None:
        """A safetensors or parquet footer: the read-ahead of a Range ends with the blob."""
        fill = Simulation(size, BLOCK, random.Random(1), room=4, cuts=False)
        fill.join(Span(size - length, size))
        fill.run()
        assert fill.written.count() <= BLOCK * (2 if (size - length) // BLOCK != (size - 1) // BLOCK else 1)


class TestOrderOfOrders:
    def test_a_far_range_begins_at_its_first_byte_and_then_takes_the_head_of_its_block(self) -> None:
        """P3: the asked byte first, whatever block it is in; whole blocks become durable, so the head follows."""
        size, start = 100 * MIB, 50 * MIB + 12_345
        span = Span(start, start + 1000)
        orders = plan(
            size=size,
            written=SpanSet(),
            wanted=SpanSet([wanted_by_range(span, size)]),
            needs=[Need(span.start, span.stop)],
            flights=[],
            room=3,
        )
        end = block_end(start, size, BLOCK)
        assert [order.span for order in orders] == [Span(start, end), Span(end - BLOCK, start), Span(end, end + BLOCK)]

    def test_readers_are_served_in_turn_before_anything_is_read_ahead(self) -> None:
        """Each reader's position first; then bytes near a reader before bytes far from all."""
        size = 100 * MIB
        needs = [Need(64 * MIB, size), Need(16 * MIB, size)]
        orders = plan(size=size, written=SpanSet(), wanted=SpanSet([Span(0, size)]), needs=needs, flights=[], room=5)
        assert [order.span.start // MIB for order in orders] == [64, 16, 24, 72, 32]

    def test_a_fast_upstream_gets_longer_orders(self) -> None:
        """Several blocks in one request, urgent ones too, but never into what is there."""
        size = 100 * MIB
        orders = plan(
            size=size,
            written=SpanSet([Span(40 * MIB, 48 * MIB)]),
            wanted=SpanSet([Span(0, size)]),
            needs=[Need(1, size)],
            flights=[],
            room=3,
            span_blocks=4,
        )
        assert [order.span for order in orders] == [
            Span(1, 32 * MIB),
            Span(32 * MIB, 40 * MIB),
            Span(48 * MIB, 80 * MIB),
        ]

    def test_without_room_a_reader_still_gets_its_block_by_the_express_lane(self) -> None:
        size = 100 * MIB
        arguments = {"size": size, "written": SpanSet(), "wanted": SpanSet([Span(0, size)]), "flights": [], "room": 0}
        assert plan(needs=[Need(0, size)], **arguments) == [Order(Span(0, BLOCK), Lane.EXPRESS)]
        assert plan(needs=[], **arguments) == []

    def test_a_blob_of_16_mib_is_small_and_one_byte_more_is_not(self) -> None:
        for size, lane in ((SMALL_BLOB, Lane.EXPRESS), (SMALL_BLOB + 1, Lane.BULK)):
            wanted = SpanSet([Span(0, size)])
            orders = plan(size=size, written=SpanSet(), wanted=wanted, needs=[Need(0, size)], flights=[], room=2)
            assert {order.lane for order in orders} == {lane}

    def test_a_reader_at_its_end_and_an_empty_blob_ask_for_nothing(self) -> None:
        size = 100 * MIB
        assert not plan(size=size, written=SpanSet(), wanted=SpanSet(), needs=[Need(7, 7)], flights=[], room=2)
        assert not plan(size=0, written=SpanSet(), wanted=SpanSet(), needs=[Need(0, 0)], flights=[], room=2)


class TestWants:
    @pytest.mark.parametrize(
        ("span", "size", "wanted"),
        [
            (Span(0, 1), 100 * MIB, Span(0, 40 * MIB)),
            (Span(9 * MIB, 10 * MIB), 100 * MIB, Span(8 * MIB, 48 * MIB)),
            (Span(0, 8 * MIB), 100 * MIB, Span(0, 8 * MIB + READ_AHEAD)),
            (Span(99 * MIB, 100 * MIB), 100 * MIB, Span(96 * MIB, 100 * MIB)),
            (Span(0, 100 * MIB), 100 * MIB, Span(0, 100 * MIB)),
            (Span(0, 5), 5, Span(0, 5)),
            (Span(3, 3), 5, Span(0, 5)),
            (Span(0, 0), 0, Span(0, 0)),
        ],
    )
    def test_a_range_wants_its_blocks_and_32_mib(self, span: Span, size: int, wanted: Span) -> None:
        assert wanted_by_range(span, size) == wanted

    @given(st.integers(1, 2**40), st.data())
    def test_what_is_wanted_is_whole_blocks_around_the_range(self, size: int, data: st.DataObject) -> None:
        start = data.draw(st.integers(0, size - 1))
        span = Span(start, data.draw(st.integers(start + 1, size)))
        wanted = wanted_by_range(span, size)
        assert wanted.start <= span.start and span.stop <= wanted.stop <= size
        assert wanted.start % BLOCK == 0 and (wanted.stop % BLOCK == 0 or wanted.stop == size)
        assert len(wanted) <= len(span) + READ_AHEAD + 2 * BLOCK


@pytest.mark.parametrize(
    ("bytes_per_s", "blocks"),
    [(0.0, 1), (1.0, 1), (BLOCK * 1.0, 1), (BLOCK * 2.9, 2), (BLOCK * 8.0, 8), (1e12, MAX_ORDER_BLOCKS)],
)
def test_an_order_takes_about_a_second(bytes_per_s: float, blocks: int) -> None:
    """Nothing known yet: one block."""
    assert order_blocks(bytes_per_s) == blocks


@pytest.mark.parametrize(
    ("size", "present", "whole", "goes_on"),
    [
        (10 * GIB, 5 * GIB, True, True),
        (10 * GIB, 5 * GIB - 1, True, False),
        (10 * GIB, 6 * GIB, True, True),
        (4 * GIB, 0, True, True),
        (4 * GIB + 1, 0, True, False),
        (4 * GIB + 1, 1, True, True),
        (0, 0, True, True),
        (10 * GIB, 10 * GIB, True, True),
        (10 * GIB, 9 * GIB, False, False),
        (1, 0, False, False),
    ],
)
def test_an_orphaned_fill_goes_on_when_half_is_there_or_little_is_missing(
    size: int, present: int, whole: bool, goes_on: bool
) -> None:
    """P4, with the default limit of 4 GiB; only a fill of the whole blob."""
    assert goes_on_orphaned(size=size, present=present, whole=whole, orphan_limit=4 * GIB) is goes_on


def test_an_orphan_limit_of_zero_still_finishes_what_is_half_there() -> None:
    assert goes_on_orphaned(size=10, present=5, whole=True, orphan_limit=0)
    assert not goes_on_orphaned(size=10, present=4, whole=True, orphan_limit=0)
