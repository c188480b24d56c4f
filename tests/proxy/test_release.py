"""release(): which unverified bytes may leave. The invariant of P1 and P1a, for every way one address can read a blob."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nearhub.planner import SMALL_BLOB
from nearhub.release import (
    DRIP,
    DRIP_EVERY_S,
    FOOTER,
    HOLD_S,
    RESERVE,
    TAIL,
    Ledger,
    Release,
    charge,
    holds_first_byte,
    is_streaming,
    release,
)
from nearhub.wire.spans import Span, SpanSet

MIB = 1024 * 1024
PIECE = MIB


@dataclass
class Response:
    """One answer to an address: a reader at `position` on its way to `stop`."""

    position: int
    stop: int
    is_footer: bool
    """Asked for with a closed or suffix range."""
    sent_at: float = float("-inf")
    sent_any: bool = False


@dataclass
class Address:
    """A client address that reads one unverified blob of which everything is there, with what it came to hold."""

    size: int
    ledger: Ledger = field(default_factory=Ledger)
    held: SpanSet = field(default_factory=SpanSet)
    sent: int = 0

    def grant(self, response: Response, *, there: int, now: float) -> Release:
        return release(
            position=response.position,
            stop=response.stop,
            there=there,
            size=self.size,
            ledger=self.ledger,
            is_footer=response.is_footer,
            silent_s=now - response.sent_at,
            sent_any=response.sent_any,
        )

    def take(self, response: Response, *, there: int, now: float, at_most: int = PIECE) -> Release:
        """As a Reader does it: ask, charge, send."""
        grant = self.grant(response, there=there, now=now)
        end = min(grant.end, response.position + at_most)
        if end > response.position:
            charge(self.ledger, start=response.position, stop=end, size=self.size, is_footer=response.is_footer)
            self.held.add(Span(response.position, end))
            self.sent += end - response.position
            response.position, response.sent_at, response.sent_any = end, now, True
        return grant

    def check(self) -> None:
        """The invariant."""
        if self.size:
            assert self.held.count() < self.size, "an address holds every byte of a blob that is not verified"
        if self.has_tail_byte:
            assert self.size > SMALL_BLOB, "the tail of a small blob left before it was verified"
            assert self.held.count() <= self.sent <= FOOTER + RESERVE, "more than a footer left beside some of the tail"

    @property
    def has_tail_byte(self) -> bool:
        tail = Span(max(0, self.size - TAIL), self.size)
        return bool(tail) and list(self.held.missing(tail)) != [tail]


class UnverifiedBlob(RuleBasedStateMachine):
    """Several responses to one address, interleaved: whole GETs, open, closed and suffix ranges, overlapping or not."""

    @initialize(
        size=st.one_of(
            st.sampled_from([0, 1, TAIL - 1, TAIL, TAIL + 1, RESERVE + TAIL, SMALL_BLOB, SMALL_BLOB + 1, 17 * MIB, 24 * MIB]),
            st.integers(0, 3 * TAIL),
            st.integers(SMALL_BLOB - TAIL, SMALL_BLOB + FOOTER + 2 * RESERVE),
            st.integers(0, 100 * MIB),
        )
    )
    def begin(self, size: int) -> None:
        self.address = Address(size)
        self.responses: list[Response] = []
        self.now = 0.0

    @precondition(lambda self: len(self.responses) < 16)
    @rule()
    def ask_for_all(self) -> None:
        self.responses.append(Response(0, self.address.size, is_footer=False))

    @precondition(lambda self: len(self.responses) < 16)
    @rule(part=st.floats(0, 1))
    def ask_for_an_open_range(self, part: float) -> None:
        self.responses.append(Response(int(part * self.address.size), self.address.size, is_footer=False))

    @precondition(lambda self: len(self.responses) < 16)
    @rule(length=st.one_of(st.sampled_from([1, TAIL, FOOTER, FOOTER + 1, FOOTER + TAIL]), st.integers(1, 20 * MIB)))
    def ask_for_a_suffix(self, length: int) -> None:
        size = self.address.size
        self.responses.append(Response(max(0, size - length), size, is_footer=True))

    @precondition(lambda self: len(self.responses) < 16)
    @rule(start=st.floats(0, 1), length=st.one_of(st.sampled_from([1, MIB, 4 * MIB]), st.integers(1, 20 * MIB)))
    def ask_for_a_closed_range(self, start: float, length: int) -> None:
        size = self.address.size
        first = int(start * size)
        self.responses.append(Response(first, min(size, first + length), is_footer=True))

    @precondition(lambda self: self.responses)
    @rule(data=st.data(), pieces=st.integers(1, 30), there=st.floats(0, 1), at_most=st.sampled_from([1, 1000, PIECE, 10**9]))
    def read(self, data: st.DataObject, pieces: int, there: float, at_most: int) -> None:
        """One response takes several pieces; any part of what it lacks is there."""
        response = data.draw(st.sampled_from(self.responses))
        for _ in range(pieces):
            reach = response.position + int(there * (self.address.size - response.position))
            self.address.take(response, there=reach, now=self.now, at_most=at_most)
        if response.position >= response.stop:
            self.responses.remove(response)

    @precondition(lambda self: self.responses)
    @rule(pieces=st.integers(1, 10))
    def read_all_in_turn(self, pieces: int) -> None:
        for _ in range(pieces):
            for response in self.responses:
                self.address.take(response, there=self.address.size, now=self.now)
        self.responses = [r for r in self.responses if r.position < r.stop]

    @precondition(lambda self: self.responses)
    @rule(rounds=st.sampled_from([1, 20, 700]))
    def drip_for_a_long_time(self, rounds: int) -> None:
        """All responses are kept alive while verification does not come."""
        for _ in range(rounds):
            self.now += DRIP_EVERY_S
            for response in self.responses:
                self.address.take(response, there=self.address.size, now=self.now)

    @precondition(lambda self: self.responses)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.responses.remove(data.draw(st.sampled_from(self.responses)))

    @invariant()
    def never_everything(self) -> None:
        if hasattr(self, "address"):
            self.address.check()

    @invariant()
    def a_grant_never_passes_what_is_there_or_was_asked(self) -> None:
        """And says how to go on: bytes, or a wait that may end."""
        for response in getattr(self, "responses", []):
            for there in (response.position, self.address.size):
                grant = self.address.grant(response, there=there, now=self.now)
                assert response.position <= grant.end <= max(response.position, min(there, response.stop))
                assert not (grant.end > response.position and (grant.again_s or grant.is_exhausted))


TestUnverifiedBlob = UnverifiedBlob.TestCase
TestUnverifiedBlob.settings = settings(max_examples=120, stateful_step_count=25, deadline=None)


def read_on(address: Address, response: Response) -> int:
    """Take what may be had at once; how many bytes it was."""
    start = response.position
    while True:
        before = response.position
        address.take(response, there=address.size, now=0.0)
        if response.position == before:
            return before - start


class TestFooters:
    @pytest.mark.parametrize("length", [1, 8, TAIL, MIB, FOOTER])
    def test_a_footer_of_a_large_blob_passes_at_once(self, length: int) -> None:
        """P1a: up to 8 MiB, by a suffix or a closed range, without a wait."""
        address = Address(100 * MIB)
        assert read_on(address, Response(100 * MIB - length, 100 * MIB, is_footer=True)) == length
        address.check()

    def test_several_footer_reads_share_one_budget(self) -> None:
        """Beyond 8 MiB in all the tail waits, and RESERVE more is dripped."""
        address = Address(100 * MIB)
        for _ in range(8):
            assert read_on(address, Response(99 * MIB, 100 * MIB, is_footer=True)) == MIB
        last = Response(99 * MIB, 100 * MIB, is_footer=True)
        assert read_on(address, last) == DRIP
        address.check()

    def test_an_open_range_gets_no_footer(self) -> None:
        """It is a download: its client would take the file for complete."""
        address = Address(100 * MIB)
        response = Response(99 * MIB, 100 * MIB, is_footer=False)
        assert read_on(address, response) == MIB - TAIL - RESERVE
        assert not address.has_tail_byte

    def test_a_blob_of_16_mib_has_no_footers_and_one_byte_more_has(self) -> None:
        for size, expected in ((SMALL_BLOB, 0), (SMALL_BLOB + 1, 100)):
            address = Address(size)
            assert read_on(address, Response(size - 100, size, is_footer=True)) == expected

    def test_a_download_spends_the_footer_budget(self) -> None:
        """Who has streamed more than 8 MiB gets no tail by asking for it separately."""
        address = Address(100 * MIB)
        read_on(address, Response(0, 9 * MIB, is_footer=True))
        assert read_on(address, Response(100 * MIB - 100, 100 * MIB, is_footer=True)) == 0

    def test_after_a_footer_nothing_can_be_downloaded_beyond_the_budget(self) -> None:
        address = Address(100 * MIB)
        read_on(address, Response(100 * MIB - 100, 100 * MIB, is_footer=True))
        assert read_on(address, Response(0, 100 * MIB, is_footer=False)) == FOOTER - 100
        address.check()


class TestDownloads:
    @pytest.mark.parametrize("size", [TAIL + RESERVE + 1, SMALL_BLOB, 100 * MIB])
    def test_a_download_runs_freely_up_to_its_reserve(self, size: int) -> None:
        address = Address(size)
        assert read_on(address, Response(0, size, is_footer=False)) == size - TAIL - RESERVE

    @pytest.mark.parametrize("size", [1, TAIL])
    def test_a_blob_within_the_tail_waits_for_verification_from_its_first_byte(self, size: int) -> None:
        address = Address(size)
        grant = address.grant(Response(0, size, is_footer=False), there=size, now=0.0)
        assert grant == Release(0, again_s=None, is_exhausted=False)

    def test_a_closed_range_below_the_tail_passes_whole(self) -> None:
        address = Address(100 * MIB)
        assert read_on(address, Response(0, 100 * MIB - TAIL, is_footer=True)) == 100 * MIB - TAIL

    def test_what_is_not_there_is_waited_for_without_a_time(self) -> None:
        """News will come: no drip, no cut."""
        address = Address(100 * MIB)
        for position in (0, 5 * MIB, 100 * MIB - TAIL):
            response = Response(position, 100 * MIB, is_footer=False)
            assert address.grant(response, there=position, now=9.0) == Release(position)

    def test_aria2_with_sixteen_connections_never_completes_an_unverified_file(self) -> None:
        """A plain GET first, then 16 closed ranges in parallel, asked again and again for an hour."""
        size = 100 * MIB
        address = Address(size)
        first = Response(0, size, is_footer=False)
        share = -(-size // 16)
        rng = random.Random(1)
        responses = [first, *(Response(i * share, min(size, (i + 1) * share), is_footer=True) for i in range(16))]
        for now in range(0, 3600, 3):
            rng.shuffle(responses)
            for response in responses:
                address.take(response, there=size, now=float(now))
                address.check()
            if now % 300 == 0:
                responses += [Response(size - 4 * MIB, size, is_footer=True), Response(size - 1, size, is_footer=True)]
        assert address.held.count() < size
        assert not address.has_tail_byte


class TestDripping:
    @pytest.mark.parametrize("is_footer", [False, True])
    @pytest.mark.parametrize("start", [0, 90 * MIB])
    def test_no_gap_is_longer_than_four_seconds_while_bytes_are_left_below_the_bound(self, start: int, is_footer: bool) -> None:
        """Clients give up after 10 s. A clock that moves by what the grant asks for, and no further."""
        size = 100 * MIB
        address = Address(size)
        response = Response(start, size, is_footer=is_footer)
        now, gaps = 100.0, []
        while True:
            position, last = response.position, response.sent_at if response.sent_any else now
            grant = address.take(response, there=size, now=now)
            if response.position > position:
                gaps.append(now - last)
            elif grant.is_exhausted:
                break
            else:
                assert grant.again_s is not None and grant.again_s > 0
                now += grant.again_s
        assert max(gaps) <= 4.0
        assert now - 100.0 >= DRIP_EVERY_S * (RESERVE // DRIP - 1), "the reserve lasts for many minutes"
        assert response.position == size - TAIL
        assert grant.again_s == DRIP_EVERY_S

    def test_a_drip_is_small_and_comes_only_when_due(self) -> None:
        size = 100 * MIB
        address = Address(size)
        response = Response(size - TAIL - RESERVE, size, is_footer=False, sent_at=0.0, sent_any=True)
        early = address.grant(response, there=size, now=1.0)
        assert early == Release(response.position, again_s=DRIP_EVERY_S - 1.0)
        assert address.grant(response, there=size, now=DRIP_EVERY_S) == Release(response.position + DRIP)
        assert address.grant(response, there=response.position + 5, now=99.0) == Release(response.position + 5)

    def test_only_who_was_sent_something_is_cut(self) -> None:
        """Before the headers an error is a clean answer, so waiting is enough."""
        size = 100 * MIB
        address = Address(size)
        unsent = Response(size - TAIL, size, is_footer=False)
        assert not address.grant(unsent, there=size, now=0.0).is_exhausted
        sent = Response(size - TAIL, size, is_footer=False, sent_at=0.0, sent_any=True)
        assert address.grant(sent, there=size, now=0.0).is_exhausted


class TestLedger:
    @pytest.mark.parametrize(
        ("sent", "streamed", "count", "is_footer", "streams"),
        [
            (0, False, 1, True, False),
            (0, False, FOOTER, True, False),
            (0, False, FOOTER + 1, True, True),
            (FOOTER, False, 1, True, True),
            (0, False, 1, False, True),
            (0, True, 1, True, True),
        ],
    )
    def test_who_reads_more_than_footers_may_hold_a_part_that_would_be_continued(
        self, sent: int, streamed: bool, count: int, is_footer: bool, streams: bool
    ) -> None:
        """P1b: such an address is recorded before the bytes leave; the mark stays."""
        ledger = Ledger(sent, streamed=streamed)
        assert is_streaming(ledger, count, is_footer=is_footer) is streams
        charge(ledger, start=0, stop=count, size=100 * MIB, is_footer=is_footer)
        assert ledger == Ledger(sent + count, has_tail=False, streamed=streams)

    def test_one_byte_of_the_tail_is_enough_to_have_it(self) -> None:
        size = 100 * MIB
        for stop, has_tail in ((size - TAIL, False), (size - TAIL + 1, True)):
            ledger = Ledger()
            charge(ledger, start=0, stop=stop, size=size, is_footer=False)
            assert ledger.has_tail is has_tail


@pytest.mark.parametrize(
    ("written", "since_start_s", "since_first_byte_s", "holds"),
    [
        (0, 0.0, None, True),
        (0, HOLD_S - 0.01, None, True),
        (0, HOLD_S, None, False),
        (0, 1.0, 0.5, True),
        (0, HOLD_S, 1.0, False),
        (1, 0.5, 0.01, True),
        (100, 0.5, 0.049, True),
        (1, 0.1, 0.06, False),
        (50, 0.5, 0.5, True),
        (25, 0.5, 0.5, True),
        (24, 0.5, 0.5, False),
        (25, 0.6, 0.5, False),
        (100, 1.9, 0.5, True),
        (100, HOLD_S, 0.1, False),
        (99, 60.0, 1.0, False),
    ],
)
def test_the_first_byte_waits_while_the_blob_will_be_verified_within_two_seconds(
    written: int, since_start_s: float, since_first_byte_s: float | None, holds: bool
) -> None:
    """P1 and P3: a 100-byte blob at the rate seen so far; after 50 ms that rate is believed, after 2 s nothing waits."""
    assert (
        holds_first_byte(missing=100, received=written, since_start_s=since_start_s, since_first_byte_s=since_first_byte_s)
        is holds
    )
