"""Who leaves the cache and when: choose_victims alone, and Space against a model, on a real directory."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nearhub.errors import StoreFailed, StoreFull
from nearhub.metrics import Metrics
from nearhub.store.bares import BareStore
from nearhub.store.blobs import USED_EVERY_S, BlobStore, Partial
from nearhub.store.disk import Disk
from nearhub.store.eviction import HIGH_WATER, LOW_WATER, DiskSpace, Space, choose_victims
from nearhub.store.holdings import Holdings
from nearhub.store.site_bodies import SiteBodies
from nearhub.wire.headers import Algo, BlobId

PAGE = 4096
HUGE = DiskSpace(2**50, 2**49)
SHM = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def blob(number: int) -> BlobId:
    return BlobId(Algo.SHA256, f"{number:064x}")


def new_root(root: Path) -> Path:
    for part in ("blobs/sha256", "blobs/sha1", "partial", "quarantine"):
        (root / part).mkdir(parents=True)
    return root


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(new_root(tmp_path / "cache"), block=PAGE)


def put(store: BlobStore, name: BlobId, size: int) -> None:
    """A complete blob of so many zeros, as a fill would leave it; its name is not true."""
    partial = store.open_partial(name, size)
    store.write(partial, 0, [bytes(size)])
    store.publish(partial)
    store.close(partial)


def is_there(store: BlobStore, name: BlobId) -> bool:
    return store.path_of(name).exists()


def holdings(store: BlobStore) -> Holdings:
    """All that is below the root of `store`."""
    return Holdings(store, BareStore(store.root / "git"), SiteBodies(store.root / "sites"))


async def scanned(store: BlobStore, limit: int | None, free: Callable[[], DiskSpace] = lambda: HUGE, **kwargs: Any) -> Space:
    """A Space that knows all there is and has come to rest."""
    space = Space(
        holdings(store),
        Metrics(),
        limit=limit,
        disk_space=lambda _: free(),
        **kwargs,
    )
    space.start()
    assert space._scan is not None
    await space._scan
    await at_rest(space)
    return space


async def at_rest(space: Space) -> None:
    while space._lowering is not None and not space._lowering.done():
        await space._lowering


async def fill(space: Space, store: BlobStore, name: BlobId, size: int) -> bool:
    """Bring a blob as the engine does; whether it was stored."""
    admitted = await space.admit(name, size)
    if admitted:
        put(store, name, size)
    await space.settle(name)
    await at_rest(space)
    return admitted


def read(space: Space, store: BlobStore, name: BlobId) -> None:
    fd = store.open_complete(name)
    assert fd is not None
    space.used(name, fd)
    os.close(fd)


class TestChoice:
    @given(st.lists(st.integers(0, 50)), st.integers(-5, 400))
    def test_the_first_that_free_enough_and_not_one_more(self, counts: list[int], need: int) -> None:
        """A prefix, in order; without its last it would not do; and no more entries are looked at than leave."""
        looked = 0

        def entries() -> Iterator[tuple[int, int]]:
            nonlocal looked
            for entry in enumerate(counts):
                looked += 1
                yield entry

        victims = choose_victims(entries(), need)
        assert victims == list(range(len(victims)))
        assert looked == len(victims)
        freed = sum(counts[: len(victims)])
        assert freed >= need or len(victims) == len(counts)
        assert not victims or freed - counts[victims[-1]] < need

    @given(st.lists(st.integers(0, 50)), st.integers(-5, 400), st.sets(st.integers(0, 20)))
    def test_what_is_kept_never_leaves_and_the_others_as_if_it_were_not_there(
        self, counts: list[int], need: int, kept: set[int]
    ) -> None:
        entries = list(enumerate(counts))
        free = [entry for entry in entries if entry[0] not in kept]
        assert choose_victims(entries, need, kept.__contains__) == choose_victims(free, need)


SIZES = {
    blob(number): size for number, size in enumerate([1, PAGE, PAGE + 1, 3 * PAGE, 5 * PAGE, 8 * PAGE, 13 * PAGE, 21 * PAGE])
}
LIMIT = 20 * PAGE
NAMES = st.sampled_from(sorted(SIZES))


class SpaceMachine(RuleBasedStateMachine):
    """Fills that are admitted, write, end and are abandoned, and readers, in any order; against what is really on disk."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.root = Path(tempfile.mkdtemp(prefix="nearhub-test-", dir=SHM))
        self.store = BlobStore(new_root(self.root / "cache"), block=PAGE)
        self.space = self.run(scanned(self.store, LIMIT))
        self.fills: dict[BlobId, tuple[Partial, int]] = {}
        """Open partial blobs, and up to where they are written."""
        self.used: list[BlobId] = []
        """What is at rest on disk, least recently used first, as far as the model knows."""

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    def teardown(self) -> None:
        for partial, _ in self.fills.values():
            self.store.close(partial)
        self.run(self.space.close())
        self.run(self.loop.shutdown_default_executor())
        self.loop.close()
        shutil.rmtree(self.root)

    def on_disk(self, name: BlobId) -> int:
        paths = (self.store.path_of(name), self.root / "cache" / "partial" / str(name) / "data")
        return sum(path.stat().st_blocks * 512 for path in paths if path.exists())

    def at_rest(self, name: BlobId) -> None:
        if name in self.used:
            self.used.remove(name)
        if self.on_disk(name):
            self.used.append(name)

    def check_who_left(self) -> None:
        """Of what was at rest, those that left were used before those that stayed."""
        self.run(at_rest(self.space))
        stayed = [name for name in self.used if self.on_disk(name)]
        assert self.used[len(self.used) - len(stayed) :] == stayed, "somebody left out of turn"
        self.used = stayed

    @rule(name=NAMES)
    def begin(self, name: BlobId) -> None:
        if name in self.fills or is_there(self.store, name):
            return
        size = -(-SIZES[name] // PAGE) * PAGE
        promised = sum(max(self.on_disk(other), -(-SIZES[other] // PAGE) * PAGE) for other in self.fills)
        if name in self.used:
            self.used.remove(name)
        admitted = self.run(self.space.admit(name, SIZES[name]))
        assert admitted == (promised + size <= LIMIT), "it fits exactly when the running fills leave room for all of it"
        if admitted:
            partial = self.store.open_partial(name, SIZES[name])
            self.fills[name] = partial, 0
        else:
            self.run(self.space.settle(name))
            self.at_rest(name)
        self.check_who_left()

    @precondition(lambda self: self.fills)
    @rule(data=st.data(), pages=st.integers(1, 8))
    def write(self, data: st.DataObject, pages: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.fills)))
        partial, position = self.fills[name]
        stop = min(SIZES[name], position + pages * PAGE)
        before = self.on_disk(name)
        self.store.write(partial, position, [bytes(stop - position)])
        # As the fill does: only what was not there before is new; a block that was not committed is written again.
        self.space.wrote(name, self.on_disk(name) - before)
        self.fills[name] = partial, stop

    @precondition(lambda self: self.fills)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        """Complete: published; else abandoned, with what is there."""
        name = data.draw(st.sampled_from(sorted(self.fills)))
        partial, position = self.fills.pop(name)
        if position == SIZES[name]:
            self.store.publish(partial)
        self.store.close(partial)
        self.run(self.space.settle(name))
        self.at_rest(name)
        self.check_who_left()

    @rule(name=NAMES)
    def read(self, name: BlobId) -> None:
        if is_there(self.store, name):
            read(self.space, self.store, name)
            self.at_rest(name)

    @invariant()
    def the_books_are_right(self) -> None:
        assert self.space.on_disk == sum(map(self.on_disk, SIZES))
        assert self.space.on_disk <= self.space.spoken_for <= LIMIT

    @invariant()
    def what_is_being_filled_is_there(self) -> None:
        for name in self.fills:
            assert (self.root / "cache" / "partial" / str(name) / "present").exists()


TestSpace = SpaceMachine.TestCase
TestSpace.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class TestWater:
    async def test_above_the_high_water_it_goes_down_to_the_low_water_and_no_further(self, store: BlobStore) -> None:
        """In the background: nobody needed the room yet."""
        space = await scanned(store, 100 * PAGE)
        for number in range(95):
            await fill(space, store, blob(number), PAGE)
        assert space.on_disk == HIGH_WATER * 100 * PAGE
        await fill(space, store, blob(95), PAGE)
        assert space.on_disk == LOW_WATER * 100 * PAGE
        assert [number for number in range(96) if not is_there(store, blob(number))] == list(range(6))
        await space.close()

    async def test_a_limit_that_was_lowered_is_met_once_everything_is_known(self, store: BlobStore) -> None:
        for number in range(10):
            put(store, blob(number), PAGE)
        space = await scanned(store, 5 * PAGE)
        assert space.on_disk == 4 * PAGE
        await space.close()

    async def test_nothing_leaves_for_what_cannot_fit_anyway(self, store: BlobStore) -> None:
        space = await scanned(store, 10 * PAGE)
        await fill(space, store, blob(1), 3 * PAGE)
        assert await space.admit(blob(2), 5 * PAGE)
        assert not await fill(space, store, blob(3), 6 * PAGE)
        assert is_there(store, blob(1))
        await space.settle(blob(2))
        await space.close()

    async def test_a_fill_that_goes_on_with_what_was_there_is_never_evicted(self, store: BlobStore) -> None:
        """Not even when everything else was used after it."""
        space = await scanned(store, 10 * PAGE)
        assert await space.admit(blob(1), 4 * PAGE)
        partial = store.open_partial(blob(1), 4 * PAGE)
        store.write(partial, 0, [bytes(3 * PAGE)])
        store.close(partial)
        await space.settle(blob(1))
        assert await space.admit(blob(1), 4 * PAGE)
        await fill(space, store, blob(2), 3 * PAGE)
        assert await fill(space, store, blob(3), 5 * PAGE)
        assert (store.root / "partial" / str(blob(1)) / "data").exists() and not is_there(store, blob(2))
        await space.relieve(100 * PAGE, since=space.evictions)
        assert (store.root / "partial" / str(blob(1)) / "data").exists() and not is_there(store, blob(3))
        await space.settle(blob(1))
        await space.close()

    async def test_what_is_pinned_stays(self, store: BlobStore) -> None:
        space = await scanned(store, 10 * PAGE, pinned=lambda: {blob(1)})
        await fill(space, store, blob(1), 3 * PAGE)
        await fill(space, store, blob(2), 3 * PAGE)
        assert not await fill(space, store, blob(3), 8 * PAGE)
        assert await fill(space, store, blob(3), 6 * PAGE)
        assert is_there(store, blob(1)) and not is_there(store, blob(2))
        await space.close()


class TestDisk:
    async def test_without_a_limit_the_disk_is_the_limit(self, store: BlobStore) -> None:
        """Less a margin of 2 %; what is older leaves, and what cannot fit is refused."""
        total = 100 * PAGE

        def disk() -> DiskSpace:
            return DiskSpace(total, total - 50 * PAGE - space.on_disk)

        space = Space(
            holdings(store),
            Metrics(),
            limit=None,
            disk_space=lambda _: disk(),
        )
        space.start()
        assert await fill(space, store, blob(1), 20 * PAGE)
        assert await fill(space, store, blob(2), 25 * PAGE)
        assert await fill(space, store, blob(3), 40 * PAGE)
        assert not is_there(store, blob(1)) and not is_there(store, blob(2)) and is_there(store, blob(3))
        assert not await fill(space, store, blob(4), 49 * PAGE)
        assert is_there(store, blob(3))
        await space.close()

    async def test_room_that_a_fill_was_promised_is_nobody_elses(self, store: BlobStore) -> None:
        """30 pages are free, 20 are promised and 5 of them written: another 16 do not fit, another 10 do."""
        free = 30 * PAGE
        space = await scanned(store, None, lambda: DiskSpace(10 * PAGE, free))
        assert await space.admit(blob(1), 20 * PAGE)
        partial = store.open_partial(blob(1), 20 * PAGE)
        store.write(partial, 0, [bytes(5 * PAGE)])
        space.wrote(blob(1), 5 * PAGE)
        free -= 5 * PAGE
        assert not await space.admit(blob(2), 11 * PAGE)
        await space.settle(blob(2))
        assert await space.admit(blob(2), 9 * PAGE)
        store.close(partial)
        await space.close()

    async def test_many_writers_that_find_the_disk_full_evict_once(self, store: BlobStore) -> None:
        space = await scanned(store, None)
        for number in range(5):
            await fill(space, store, blob(number), PAGE)
        since = space.evictions
        assert await asyncio.gather(*(space.relieve(PAGE, since=since) for _ in range(16))) == [True] * 16
        assert [is_there(store, blob(number)) for number in range(5)] == [False, True, True, True, True]
        await space.relieve(100 * PAGE, since=space.evictions)
        assert not await space.relieve(PAGE, since=space.evictions)
        await space.close()

    async def test_what_cannot_be_removed_is_passed_over(self, store: BlobStore) -> None:
        """And it still counts."""

        class Stubborn(Disk):
            def unlink(self, path: Path) -> None:
                if path == store.path_of(blob(1)):
                    raise StoreFailed("no")
                super().unlink(path)

        space = await scanned(store, 10 * PAGE)
        for number in range(1, 4):
            await fill(space, store, blob(number), 3 * PAGE)
        store.disk = Stubborn()
        assert not await fill(space, store, blob(4), 4 * PAGE)
        assert await fill(space, store, blob(4), 4 * PAGE)
        assert is_there(store, blob(1)) and is_there(store, blob(4))
        assert space.on_disk == sum(path.stat().st_blocks * 512 for path in (store.root / "blobs").rglob("*") if path.is_file())
        await space.close()

    async def test_a_fill_waits_for_the_eviction_of_its_own_blob(self, store: BlobStore) -> None:
        """Else it would continue a partial blob that is being removed."""
        entered, release = threading.Event(), threading.Event()

        class Slow(Disk):
            def remove_tree(self, path: Path) -> None:
                entered.set()
                assert release.wait(30)
                super().remove_tree(path)

        space = await scanned(store, 10 * PAGE)
        assert await space.admit(blob(1), 4 * PAGE)
        partial = store.open_partial(blob(1), 4 * PAGE)
        store.write(partial, 0, [bytes(2 * PAGE)])
        store.close(partial)
        await space.settle(blob(1))
        store.disk = Slow()
        eviction = asyncio.ensure_future(space.relieve(1, since=space.evictions))
        await asyncio.to_thread(entered.wait, 30)
        admission = asyncio.ensure_future(space.admit(blob(1), 4 * PAGE))
        for _ in range(100):
            await asyncio.sleep(0)
        assert not admission.done()
        release.set()
        assert await eviction and await admission
        assert space.on_disk == 0 and space.spoken_for == 4 * PAGE
        await space.settle(blob(1))
        await space.close()


class TestScan:
    async def test_the_order_of_use_is_read_from_the_files(self, store: BlobStore) -> None:
        """Of complete and partial blobs; the time of use is written at most once an hour, and nothing else of the file."""
        now = store.clock()
        for number in range(4):
            put(store, blob(number), PAGE)
        partial = store.open_partial(blob(4), 2 * PAGE)
        store.write(partial, 0, [bytes(PAGE)])
        store.close(partial)
        for hours, number in enumerate([2, 0, 3, 1], 2):
            store.clock = lambda hours=hours: now + hours * USED_EVERY_S  # type: ignore[misc]
            os.close(store.open_complete(blob(number)) or 0)
        space = await scanned(BlobStore(store.root), None)
        assert list(space._held) == [blob(4), blob(2), blob(0), blob(3), blob(1)]
        info = store.path_of(blob(1)).stat()
        store.clock = lambda: now + 5.5 * USED_EVERY_S
        os.close(store.open_complete(blob(1)) or 0)
        assert store.path_of(blob(1)).stat() == info
        await space.close()

    async def test_bytes_in_quarantine_count_and_leave_but_their_record_stays(self, store: BlobStore) -> None:
        before = await scanned(store, 10 * PAGE)
        assert await before.admit(blob(1), 4 * PAGE)
        partial = store.open_partial(blob(1), 4 * PAGE)
        store.write(partial, 0, [bytes(4 * PAGE)])
        store.quarantine(partial, ["10.0.0.1"])
        store.close(partial)
        await before.settle(blob(1))
        await before.close()
        space = await scanned(store, 10 * PAGE)
        assert before.on_disk == space.on_disk == 4 * PAGE
        assert await fill(space, store, blob(2), 8 * PAGE)
        assert space.on_disk == 8 * PAGE
        assert not (store.root / "quarantine" / str(blob(1)) / "data").exists()
        after = BlobStore(store.root, block=PAGE)
        after.recover()
        mismatch = after.mismatch(blob(1))
        assert mismatch is not None and mismatch.readers == {"10.0.0.1"}
        await space.close()

    async def test_what_happens_during_the_scan_counts_once(self, store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
        """A blob that is read, one that is filled and one that is left alone, all seen by the scan as well."""
        for number in range(3):
            put(store, blob(number), 2 * PAGE)
        release = threading.Event()
        scan = BlobStore.scan

        def slow_scan(self: BlobStore) -> Iterator[tuple[BlobId, int, float]]:
            yield from scan(self)
            assert release.wait(30)

        monkeypatch.setattr(BlobStore, "scan", slow_scan)
        space = Space(
            holdings(store),
            Metrics(),
            limit=None,
            disk_space=lambda _: HUGE,
        )
        space.start()
        read(space, store, blob(0))
        assert await fill(space, store, blob(3), 3 * PAGE)
        assert not await space.relieve(1, since=space.evictions), "nothing is evicted before everything is known"
        release.set()
        assert space._scan is not None
        await space._scan
        assert space.on_disk == 9 * PAGE
        assert sorted(list(space._held)[:2]) == [blob(1), blob(2)] and list(space._held)[2:] == [blob(0), blob(3)]
        await space.close()

    async def test_a_hundred_thousand_blobs_are_read_while_the_loop_goes_on(self) -> None:
        """All are found, with their sizes; strange files, links and misplaced names are not."""
        root = Path(tempfile.mkdtemp(prefix="nearhub-test-", dir=SHM))
        try:
            store = BlobStore(new_root(root / "cache"))
            names = [BlobId(Algo.SHA256, f"{number % 2**12:04x}{number:060x}") for number in range(100_000)]
            made = set()
            for name in names:
                path = store.path_of(name)
                if path.parent not in made:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    made.add(path.parent)
                sparse(path, 5000)
            (store.root / "blobs" / "sha256" / "x").write_bytes(b"x")
            (store.path_of(names[0]).parent / "README").write_bytes(b"x")
            (store.path_of(names[0]).parent / ("f" * 64)).write_bytes(b"x")
            (store.path_of(names[1]).parent / f"{names[1].hex[:4]}{'e' * 60}").symlink_to(store.path_of(names[1]))
            space = Space(
                holdings(store),
                Metrics(),
                limit=None,
                disk_space=lambda _: HUGE,
            )
            space.start()
            assert space._scan is not None
            turns = 0
            while not space._scan.done():
                await asyncio.sleep(0)
                turns += 1
            assert turns > 100
            assert len(space._held) == len(names) and space.on_disk == 5000 * len(names)
            await space.close()
        finally:
            await asyncio.to_thread(shutil.rmtree, root)


def sparse(path: Path, size: int) -> None:
    fd = os.open(path, os.O_CREAT | os.O_WRONLY, 0o444)
    os.ftruncate(fd, size)
    os.close(fd)


class TestRecords:
    def test_a_mismatch_without_bytes_is_remembered_after_a_restart(self, store: BlobStore) -> None:
        store.record_mismatch(blob(1), ["10.0.0.1"])
        assert store.record_mismatch(blob(1), ["10.0.0.2"]).count == 2
        after = BlobStore(store.root)
        after.recover()
        mismatch = after.mismatch(blob(1))
        assert mismatch is not None and (mismatch.count, mismatch.readers) == (2, {"10.0.0.1", "10.0.0.2"})

    def test_on_a_full_disk_wrong_bytes_are_dropped_and_remembered_by_this_process(self, store: BlobStore) -> None:
        """They must not be continued, and there is no room to record why."""

        class Full(Disk):
            def write_file(self, path: Path, data: bytes) -> None:
                raise StoreFull("the disk is full")

        partial = store.open_partial(blob(1), 2 * PAGE)
        store.write(partial, 0, [bytes(2 * PAGE)])
        store.commit(partial, [0, 1])
        store.disk = Full()
        assert store.quarantine(partial, ["10.0.0.1"]) == store.mismatch(blob(1))
        store.close(partial)
        store.disk = Disk()
        again = store.open_partial(blob(1), 2 * PAGE)
        assert not again.durable
        store.close(again)
