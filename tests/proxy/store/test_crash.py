"""The store is killed, or loses its power, at any operation: what recovery believes is true (P8). See life.py for the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nearhub.store.disk import Disk
from nearhub.wire.spans import Span, block_span, blocks_touching
from tests.proxy.store.disks import CrashingDisk
from tests.proxy.store.life import BLOCK, LARGE, TRUTH, Death, Life, missing

BLOB = next(blob for blob, content in TRUTH.items() if content == LARGE)
BLOBS = st.sampled_from(sorted(TRUTH))
ADDRESSES = st.sampled_from(["10.0.0.1", "10.0.0.2", "fd00::1"])
DEATHS = st.one_of(st.none(), st.none(), st.none(), st.tuples(st.integers(0, 12), st.integers(0, 2**32)))
RARELY = st.sampled_from([False, False, False, True])


class StoreMachine(RuleBasedStateMachine):
    """Every operation of the store, on a few small blobs, until the process dies; then recovery, which may die too."""

    loses_power: bool

    def __init__(self) -> None:
        super().__init__()
        self.life = Life(loses_power=self.loses_power)

    def teardown(self) -> None:
        self.life.end()

    def open_where(self, holds: Callable[..., object]) -> st.SearchStrategy:  # type: ignore[type-arg]
        return st.sampled_from([blob for blob in sorted(self.life.open) if holds(blob)])

    def is_missing_some(self, blob: object) -> bool:
        return not self.life.is_whole(blob)  # type: ignore[arg-type]

    @rule(blob=BLOBS, is_lying=st.booleans(), death=DEATHS)
    def begin(self, blob: object, is_lying: bool, death: Death | None) -> None:
        self.life.die_after(death)
        self.life.begin(blob, is_lying=is_lying)  # type: ignore[arg-type]

    @precondition(lambda self: any(map(self.is_missing_some, self.life.open)))
    @rule(data=st.data(), is_block=st.booleans())
    def write(self, data: st.DataObject, is_block: bool) -> None:
        """Any bytes that are not there yet, as they come from upstream: blocks in any order, or pieces of them."""
        blob = data.draw(self.open_where(self.is_missing_some))
        span = data.draw(st.sampled_from(missing(self.life.written[blob], blob)))
        if is_block:
            index = data.draw(st.sampled_from(blocks_touching(span, BLOCK)))
            span = span.overlap(block_span(index, len(TRUTH[blob]), BLOCK))
        else:
            start = data.draw(st.integers(span.start, span.stop - 1))
            span = Span(start, data.draw(st.integers(start + 1, span.stop)))
        self.life.write(blob, span)

    @precondition(lambda self: any(map(self.is_missing_some, self.life.open)))
    @rule(data=st.data())
    def write_the_rest(self, data: st.DataObject) -> None:
        blob = data.draw(self.open_where(self.is_missing_some))
        for span in missing(self.life.written[blob], blob):
            if blob in self.life.open:
                self.life.write(blob, span)

    @precondition(lambda self: any(map(self.life.uncommitted, self.life.open)))
    @rule(data=st.data(), death=DEATHS)
    def commit(self, data: st.DataObject, death: Death | None) -> None:
        self.life.die_after(death)
        self.life.commit(data.draw(self.open_where(self.life.uncommitted)))

    @precondition(lambda self: self.life.open)
    @rule(data=st.data(), address=ADDRESSES, death=DEATHS)
    def note_reader(self, data: st.DataObject, address: str, death: Death | None) -> None:
        self.life.die_after(death)
        self.life.note_reader(data.draw(self.open_where(bool)), address)

    @precondition(lambda self: any(map(self.life.is_whole, self.life.open)))
    @rule(data=st.data(), address=ADDRESSES, death=DEATHS)
    def verify(self, data: st.DataObject, address: str, death: Death | None) -> None:
        self.life.die_after(death)
        self.life.verify(data.draw(self.open_where(self.life.is_whole)), address)

    @precondition(lambda self: self.life.open)
    @rule(data=st.data(), is_time=RARELY)
    def end_fill(self, data: st.DataObject, is_time: bool) -> None:
        """Its readers left: what is durable is kept, what is merely written may be believed by nobody."""
        if is_time:
            self.life.close(data.draw(self.open_where(bool)))

    @rule(blob=BLOBS, death=DEATHS, is_time=RARELY)
    def evict(self, blob: object, death: Death | None, is_time: bool) -> None:
        if is_time:
            self.life.die_after(death)
            self.life.evict(blob)  # type: ignore[arg-type]

    @rule(death=DEATHS, in_recovery=st.none() | st.integers(0, 12), is_time=RARELY)
    def die(self, death: Death | None, in_recovery: int | None, is_time: bool) -> None:
        if is_time:
            self.life.die_after(death)
            self.life.restart(in_recovery)

    @invariant()
    def what_is_served_is_true(self) -> None:
        self.life.check()


class KilledStore(StoreMachine):
    """kill -9: the process dies, the system lives."""

    loses_power = False


class PowerlessStore(StoreMachine):
    """A power cut: what was not synced may be lost, any part of it."""

    loses_power = True


TestKilledStore = KilledStore.TestCase
TestKilledStore.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
TestPowerlessStore = PowerlessStore.TestCase
TestPowerlessStore.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)


def a_whole_life(life: Life) -> None:
    """A fill that is quarantined, a second that is continued and published, and its eviction; each step begins the fill
    again where a crash ended it."""

    def fill(step: Callable[[], None], *, is_lying: bool = False) -> None:
        life.begin(BLOB, is_lying=is_lying)
        if BLOB in life.open:
            step()

    def write(index: int) -> None:
        for span in missing(life.written[BLOB], BLOB):
            if BLOB in life.open and (piece := span.overlap(block_span(index, len(LARGE), BLOCK))):
                life.write(BLOB, piece)

    def commit() -> None:
        if life.uncommitted(BLOB):
            life.commit(BLOB)

    def verify() -> None:
        if life.is_whole(BLOB):
            life.verify(BLOB, "10.0.0.3")

    for is_lying, first, *others in ((True, 0, 1, 2, 3, 4, 5), (False, 1, 0, 2, 3, 4, 5)):
        steps: list[Callable[[], None]] = [
            lambda: life.close(BLOB),
            lambda: write(first),  # noqa: B023
            commit,
            lambda: life.note_reader(BLOB, "10.0.0.2"),
            lambda: write(others[0]),  # noqa: B023
            commit,
            lambda: life.close(BLOB),
            *(lambda index=index: write(index) for index in others),  # type: ignore[misc]
            verify,
        ]
        for step in steps:
            fill(step, is_lying=is_lying)
        for blob in sorted(TRUTH):  # moments in which something else is under way
            life.begin(blob)
            if blob in life.open:
                life.close(blob)
    life.evict(BLOB)


@pytest.mark.parametrize(("loses_power", "seeds"), [(False, 1), (True, 4)], ids=["kill", "power cut"])
def test_a_whole_life_may_end_at_each_of_its_operations(loses_power: bool, seeds: int) -> None:
    """From the first operation of the disk to the last, one after the other; and whatever a power cut leaves."""
    for left in range(500):
        lives = [one_life(loses_power=loses_power, death=(left, seed)) for seed in range(seeds)]
        if not any(lives):
            assert left > 50, "this life is too short to be of use"
            return
    raise AssertionError("this life does not end")


def one_life(*, loses_power: bool, death: Death) -> int:
    """How often it died."""
    life = Life(loses_power=loses_power)
    try:
        life.die_after(death)
        a_whole_life(life)
        life.check()
        return life.crashes
    finally:
        life.end()


def test_every_operation_of_the_disk_is_one_it_can_die_in() -> None:
    """Else the tests above would not try all moments."""
    operations = [name for name in vars(Disk) if not name.startswith("_")]
    assert len(operations) >= 11
    assert all(name in vars(CrashingDisk) for name in operations)
