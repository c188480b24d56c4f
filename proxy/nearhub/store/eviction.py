"""Space: how many bytes the cache has, how many it may have, and which blobs leave to make room. Owner of that accounting.

What counts is what is on disk (complete, partial and condemned blobs) and what running fills have been promised and not yet
written. The ceiling is `--max-size`, or what the disk could hold less a margin, if that is lower. A fill is admitted
only when all of it fits under the ceiling: whole blobs leave for it, least recently used first, until it does; above the high
water they leave in the background, down to the low water. A blob that a fill is bringing never leaves; a reader of one that
leaves goes on, since its descriptor stays good. Bare git mirrors count and leave in the same way, each as one; in use, one
stays.

The order is a dict in memory. It is read from the access times of the files once, in a thread, when the mirror is up; until
then nothing is evicted. An eviction costs what it evicts.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from operator import itemgetter
from typing import TypeVar

from nearhub.errors import StoreError
from nearhub.metrics import Metrics
from nearhub.store.blobs import Held, size_on_disk
from nearhub.store.holdings import Holding, Holdings
from nearhub.tasks import uncancelled
from nearhub.wire.headers import BlobId

log = logging.getLogger(__name__)
T = TypeVar("T")

HIGH_WATER = 0.95
"""Of the ceiling; above it eviction begins …"""
LOW_WATER = 0.90
"""… and goes on down to this."""
MARGIN_BYTES = 1024**3
MARGIN_SHARE = 0.02
"""Free space of the disk that is left to others: the smaller of MARGIN_BYTES and this share of it."""
SCAN_WAIT_S = 3.0
"""A fill waits this long for the first scan, when there is a limit; then it is admitted by what is known."""
_PAGE = 4096


def choose_victims(entries: Iterable[tuple[T, int]], need: int, is_kept: Callable[[T], bool] = lambda what: False) -> list[T]:
    """The first of `entries` (what, bytes), which are least recently used first, that free `need` bytes together; all of them
    when they do not; never one that is kept. Looks at no more than it returns, and at what is kept before."""
    victims: list[T] = []
    if need <= 0:
        return victims
    for what, count in entries:
        if is_kept(what):
            continue
        victims.append(what)
        need -= count
        if need <= 0:
            break
    return victims


@dataclass(slots=True)
class Promise:
    """Room for a running fill: all it still had to bring when it was admitted, and what of that is not written yet."""

    missing: int = 0
    left: int = 0


@dataclass(frozen=True, slots=True)
class DiskSpace:
    """Bytes of the file system: all, and free to this user."""

    total: int
    free: int


def _disk_space(store: Holdings) -> DiskSpace:
    usage = shutil.disk_usage(store.root)
    return DiskSpace(usage.total, usage.free)


class Space:
    """`limit` in bytes; None: only the disk's. To be used on the loop; what blocks is done in threads.

    A fill: `admit` before its first byte, `wrote` as it goes, `settle` at its end, always.
    """

    def __init__(
        self,
        store: Holdings,
        metrics: Metrics,
        *,
        limit: int | None,
        pinned: Callable[[], Set[Holding]] = frozenset,
        disk_space: Callable[[Holdings], DiskSpace] = _disk_space,
    ) -> None:
        self.limit = limit
        self.evictions = 0
        self._store = store
        self._metrics = metrics
        self._pinned = pinned
        self._disk_space = disk_space
        self._held: OrderedDict[Holding, int] = OrderedDict()
        """Bytes on disk, least recently used first; of a blob in `_promised`, those from before its fill."""
        self._bytes = 0
        """The sum of `_held`."""
        self._promised: dict[Holding, Promise] = {}
        self._lock = asyncio.Lock()
        """Held while room is decided upon and made: admissions and evictions come one after the other."""
        self._scanned = asyncio.Event()
        self._scan: asyncio.Task[None] | None = None
        self._lowering: asyncio.Task[None] | None = None
        self._is_closed = False
        metrics.cache_limit.set(limit or 0)
        metrics.cache_bytes.set_function(lambda: self.on_disk)

    def __repr__(self) -> str:
        return f"<Space {self.on_disk} bytes of {len(self._held)} blobs, {len(self._promised)} fills, limit {self.limit}>"

    @property
    def on_disk(self) -> int:
        """Bytes that the store has on disk now."""
        return self._bytes + sum(promise.missing - promise.left for promise in self._promised.values())

    @property
    def spoken_for(self) -> int:
        """… and those that running fills will add."""
        return self._bytes + sum(promise.missing for promise in self._promised.values())

    # — the first scan ——————————————————————————————————————————————————————————————————————————

    def start(self) -> None:
        """Begin to learn what is there. Nothing waits for it but eviction."""
        self._scan = asyncio.get_running_loop().create_task(self._learn(), name="scan of the cache")

    async def _learn(self) -> None:
        started = time.monotonic()
        found, total = await asyncio.to_thread(self._look)
        # What is known already was used, or changed, since the scan began.
        for what, count in self._held.items():
            total += count - found.pop(what, 0)
            found[what] = count
        self._held, self._bytes = found, total
        log.info("cache: %d blobs, %d bytes, read in %.1f s", len(found), total, time.monotonic() - started)
        self._scanned.set()
        self._lower()

    def _look(self) -> tuple[OrderedDict[Holding, int], int]:
        """In a thread."""
        seen: list[tuple[float, Holding, int]] = []
        for what, count, used_at in self._store.scan():
            if self._is_closed:
                break
            seen.append((used_at, what, count))
        seen.sort(key=itemgetter(0))
        found: OrderedDict[Holding, int] = OrderedDict()
        total = 0
        for _, what, count in seen:
            total += count
            found[what] = count + found.pop(what, 0)
        return found, total

    # — what fills and readers tell ———————————————————————————————————————————————————————————————

    def could_hold(self, size: int) -> bool:
        """Whether a blob of `size` bytes fits at all, if everything else leaves."""
        return self.limit is None or _rounded(size) <= self.limit

    def used(self, blob: BlobId, fd: int) -> None:
        """A complete blob was opened."""
        if blob in self._held:
            self._held.move_to_end(blob)
        elif (info := os.fstat(fd)).st_nlink:
            self._set(blob, size_on_disk(info))

    def touched(self, what: Holding) -> None:
        """It was used now."""
        if what in self._held:
            self._held.move_to_end(what)

    async def admit(self, what: Holding, size: int) -> bool:
        """Promise room for all of it, `size` bytes, and keep it from eviction until settle(); others leave for it if need be.

        False: it does not fit now. The caller settles in either case. Never waits for a fill.
        """
        promise = self._promised[what] = Promise()
        if self.limit is not None:
            await self._wait_for_scan()
        async with self._lock:  # so an eviction of it that was under way is over
            there = await asyncio.to_thread(self._store.held, what)
            self._set(what, _sum(there))
            missing = max(0, _rounded(size) - there.bytes)
            ceiling = await self._ceiling()
            if self.spoken_for + missing > ceiling:
                if self._unmovable() + missing > ceiling:
                    return False
                await self._wait_for_scan()
                await self._evict(self.spoken_for + missing - ceiling)
            if self.spoken_for + missing > ceiling:
                return False
            promise.missing = promise.left = missing
        if self.spoken_for > HIGH_WATER * ceiling:
            self._lower()
        return True

    def wrote(self, what: Holding, count: int) -> None:
        """So much of what was promised is on disk."""
        promise = self._promised[what]
        promise.left = max(0, promise.left - count)

    async def arrived(self, blob: BlobId, of: Holding) -> None:
        """`blob` is complete; its room was promised to `of`."""
        count = (await asyncio.to_thread(self._store.held, blob)).bytes
        promise = self._promised[of]
        promise.missing = max(0, promise.missing - count)
        promise.left = min(promise.left, promise.missing)
        self._set(blob, count)

    async def relieve(self, need: int, *, since: int) -> bool:
        """The disk is full although room was promised: others than we write to it. Evict `need` bytes at least.

        `since` is what `evictions` was before the failure. False: there is nothing to evict.
        """
        async with self._lock:
            if self.evictions == since:
                await self._evict(need)
            return self.evictions != since

    async def settle(self, what: Holding) -> None:
        """Bringing it is over: what is on disk now is what counts."""
        try:
            count = _sum(await asyncio.to_thread(self._store.held, what))
        except StoreError as exc:
            log.warning("%s: all that was promised counts as used: %s", what, exc)
            count = self._held.get(what, 0) + self._promised[what].missing
        self._set(what, count)
        del self._promised[what]
        self._lower()

    async def remove(self, what: Holding) -> bool:
        """Forget it, whatever it is worth. False: it is being brought, or a clone is under way."""
        async with self._lock:
            if what in self._promised or self._store.is_in_use(what):
                return False
            await self._forget(what)
        return True

    def _set(self, what: Holding, count: int) -> None:
        """As the most recently used one."""
        self._bytes += count - self._held.pop(what, 0)
        if count:
            self._held[what] = count

    # — eviction ————————————————————————————————————————————————————————————————————————————————

    def _is_kept(self, what: Holding) -> bool:
        return what in self._promised or what in self._pinned() or self._store.is_in_use(what)

    def _unmovable(self) -> int:
        """Bytes that no eviction frees, for as long as the fills run and the pins stand."""
        filling = sum(self._held.get(what, 0) + promise.missing for what, promise in self._promised.items())
        return filling + sum(self._held.get(what, 0) for what in self._pinned() if what not in self._promised)

    async def _ceiling(self) -> int:
        """Bytes that the cache may have now."""
        limits = [] if self.limit is None else [self.limit]
        try:
            disk = await asyncio.to_thread(self._disk_space, self._store)
        except OSError as exc:
            log.warning("the free space of the disk is not known: %s", exc)
        else:
            limits.append(self.on_disk + disk.free - min(MARGIN_BYTES, int(MARGIN_SHARE * disk.total)))
        return max(0, min(limits, default=2**63))

    async def _evict(self, need: int) -> None:
        """Free `need` bytes, or what can be freed. The lock is held."""
        if not self._scanned.is_set():
            return
        victims = choose_victims(self._held.items(), need, self._is_kept)
        for what in victims:
            if self._is_kept(what):  # meanwhile
                continue
            count = self._held.get(what, 0)
            try:
                await self._forget(what)
            except StoreError as exc:
                log.warning("%s could not be evicted: %s", what, exc)
                self._held.move_to_end(what)
                continue
            self.evictions += 1
            self._metrics.evicted_blobs.inc()
            self._metrics.evicted_bytes.inc(count)
            log.debug("evicted %s, %d bytes", what, count)

    async def _forget(self, what: Holding) -> None:
        """To the end, also if whoever needs the room is cancelled: the lock, which is held, keeps fills from this blob."""

        async def forget() -> None:
            await asyncio.to_thread(self._store.remove, what)
            self._set(what, 0)

        await uncancelled(forget())

    def _lower(self) -> None:
        """In the background: down to the low water if above the high one."""
        if self._scanned.is_set() and not self._is_closed and (self._lowering is None or self._lowering.done()):
            self._lowering = asyncio.get_running_loop().create_task(self._lower_down(), name="eviction")

    async def _lower_down(self) -> None:
        async with self._lock:
            ceiling = await self._ceiling()
        if self.spoken_for <= HIGH_WATER * ceiling:
            return
        first = self.evictions
        while self.spoken_for > LOW_WATER * ceiling:
            before = self.evictions
            async with self._lock:
                await self._evict(1)  # one at a time: an admission need not wait for all
            if self.evictions == before:
                break
        log.info("evicted %d blobs down to %d bytes of %d", self.evictions - first, self.spoken_for, ceiling)

    async def _wait_for_scan(self) -> None:
        if self._scan is not None and not self._scan.done():
            await asyncio.wait([self._scan], timeout=SCAN_WAIT_S)

    async def close(self) -> None:
        """End the scan and the eviction under way."""
        self._is_closed = True
        tasks = [task for task in (self._scan, self._lowering) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _sum(held: Held) -> int:
    return held.bytes + held.aside


def _rounded(size: int) -> int:
    """To whole pages, as a file system will."""
    return -(-size // _PAGE) * _PAGE
