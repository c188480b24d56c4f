"""FillEngine: one Fill per blob brings its missing bytes and is the only writer of it; readers attach and leave.

Decisions are made elsewhere, in pure functions: planner.plan (which bytes next), release.release (which bytes may leave).
Here they are acted upon. A Fill owns its tasks (verifier, committer, one per request under way) in a TaskGroup; the engine owns
the Fills. A handler that is cancelled closes its Reader, never the Fill.

Three sets of bytes, and which may be believed for what:
    claimed ⊇ written      claimed: some request is writing them; nobody else does
    written ⊇ durable      written: readers of this process may have them; durable: they survive a crash
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import random
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from nearhub import planner, trace
from nearhub.budget import Budget
from nearhub.digest import BlobHash
from nearhub.errors import (
    HubRefusal,
    NearhubError,
    Offline,
    StoreError,
    StoreFull,
    UpstreamBusy,
    UpstreamError,
    UpstreamFailed,
    UpstreamLied,
)
from nearhub.metrics import Metrics
from nearhub.passage import PROGRESS_BYTES, SHORT_WAIT_S, Passage, Remains, Route
from nearhub.planner import Lane, Need, Order
from nearhub.reader import Reader, Reading
from nearhub.release import FOOTER, HOLD_S, Ledger, holds_first_byte
from nearhub.store.blobs import BlobStore, Partial
from nearhub.store.eviction import Space
from nearhub.tasks import uncancelled
from nearhub.upstream.client import Body, Location, Upstream
from nearhub.upstream.dispatch import Dispatcher, Slots
from nearhub.wire.headers import BlobId, FileMetadata, ObjectMetadata
from nearhub.wire.ranges import Asked, Shape
from nearhub.wire.reply import Caution
from nearhub.wire.spans import Span, SpanSet, block_end, block_span, blocks_touching
from nearhub.wire.target import FileTarget, LfsTarget

log = logging.getLogger(__name__)
T = TypeVar("T")

WAKE_BYTES = 256 * 1024
WAKE_S = 0.01
"""Readers are woken when this many bytes are new, or after this time."""
HASH_BYTES = 4 * 1024 * 1024
MAX_LEDGERS = 4096
BRING_NEWS_S = 0.25
"""How often who brings a blob ahead of its use hears how far it is."""
RELIEFS = 3
"""How often room is made for one write that found the disk full."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a fill bears with an upstream. Seconds, bytes per second."""

    hedge_after_s: float = 3.0
    min_rate: float = 1024.0
    rate_window_s: float = 60.0
    first_backoff_s: float = 0.2
    strikes: int = 5
    """Failures in a row, without a byte in between, that end a fill."""
    strikes_unproved: int = 2
    """… while this fill has not had a single good answer."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a blob can be asked for: a file of a repo at a commit."""

    target: FileTarget
    meta: FileMetadata


@dataclass(frozen=True, slots=True)
class LfsSource:
    """… or an LFS object of a repo, of which no commit and path are known here."""

    target: LfsTarget
    meta: ObjectMetadata


@dataclass(slots=True, eq=False)
class Flight:
    """One request under way. It writes at `position`, up to `stop`, which only ever shrinks (a 200 for a Range excepted)."""

    position: int
    stop: int
    client: str
    is_hedge: bool
    heard_at: float | None = None
    """When its last byte came; None while it waits for a connection: that is no silence of the upstream's."""
    is_hedged: bool = False
    lane: Lane = Lane.BULK
    is_queued: bool = True
    """It has no place among the connections yet."""
    received: int = 0
    task: asyncio.Task[None] | None = None

    def seen(self, now: float) -> planner.Flight:
        silent_s = 0.0 if self.heard_at is None else now - self.heard_at
        return planner.Flight(self.position, self.stop, silent_s, self.is_hedged or self.is_hedge)


class Fill:
    """The one task that brings a blob's missing bytes. Lives while there are readers or work; never restarted."""

    def __init__(self, engine: FillEngine, source: Source | LfsSource, owner: str = "") -> None:
        self.blob: BlobId = source.meta.blob
        self.size = source.meta.size
        self.source: Source | LfsSource = source
        self.written = SpanSet()
        self.is_whole_wanted = False
        self.is_verified = False
        self.is_closing = False
        """Set, without an await in between, when the driver decides to end: nobody may attach any more."""
        self.done = asyncio.Event()
        self.error: NearhubError | None = None
        self.has_flown = False
        self.began_empty = True
        self._engine = engine
        self._patience = engine.patience
        self._store = engine.store
        self._partial: Partial | None = None
        self._complete_fd: int | None = None
        self._claimed = SpanSet()
        self._queued: set[int] = set()
        self._to_commit: list[int] = []
        self._committing: list[int] = []
        self._began_with = 0
        self._commits = asyncio.Event()
        self._committed = asyncio.Event()
        self._readers: dict[Reader, Span] = {}
        self._sponsors: list[Budget] = []
        """Of those who want it whole without reading it."""
        self._flights: dict[Flight, None] = {}
        self._locations: dict[Upstream, Location] = {}
        self._is_sequential = False
        self._is_proved = False
        self._strikes = 0
        self._busy_since: float | None = None
        self._not_before = 0.0
        self._rate = 0.0
        self._started_at = time.monotonic()
        self._first_byte_at: float | None = None
        self._driver_news = asyncio.Event()
        self._reader_news = asyncio.Event()
        self._unannounced = 0
        self._announcement: asyncio.TimerHandle | None = None
        self._io: set[asyncio.Future[object]] = set()
        self._hash = BlobHash(self.blob, self.size)
        self._is_promised = False
        """Whether room was asked for, so that it must be settled."""
        self._is_doubtful = False
        """A sync found no room: what is written and not durable may not be what was written."""
        self._owner = owner

    def __repr__(self) -> str:
        have = f"{self.written.count()}/{self.size}"
        return (
            f"<Fill {self.blob} {have} [{len(self._readers)} readers | {len(self._flights)} flights, {self._strikes} strikes]>"
        )

    # — readers ————————————————————————————————————————————————————————————————————————————————

    @property
    def fd(self) -> int:
        if self._partial is not None:
            return self._partial.fd
        assert self._complete_fd is not None
        return self._complete_fd

    def attach(self, asked: Asked, address: str, source: Source | LfsSource) -> Reader:
        """A new reader, and what it wants (P4). Sync: nothing can slip between looking the fill up and attaching."""
        reader = Reader(asked, self.size, address, fill=self, on_close=self._engine.metrics.readers_active.dec)
        wants_all = asked.shape is Shape.OPEN
        if wants_all:
            self.is_whole_wanted = True
        self._readers[reader] = (
            Span(0, self.size)
            if wants_all or not asked.span
            else planner.wanted_by_range(asked.span, self.size, self._store.block)
        )
        for flight in [flight for flight in self._flights if flight.lane is Lane.PREFETCH and flight.is_queued]:
            self._flights.pop(flight)  # ordered anew, where clients' are
            if flight.task is not None:
                flight.task.cancel()
        self.source = source
        self._owner = address
        self._driver_news.set()
        self._engine.metrics.readers_active.inc()
        return reader

    def detach(self, reader: Reader) -> None:
        self._readers.pop(reader, None)
        self._driver_news.set()
        self._close_files()

    @contextlib.contextmanager
    def sponsored(self, budget: Budget) -> Iterator[None]:
        """Bring it whole, even if nobody reads it, at the pace of `budget` while nobody does. On leaving, P4 decides again."""
        self._sponsors.append(budget)
        self._driver_news.set()
        try:
            yield
        finally:
            self._sponsors.remove(budget)
            self._driver_news.set()

    @property
    def _wants_whole(self) -> bool:
        return self.is_whole_wanted or bool(self._sponsors)

    @property
    def _sponsor(self) -> Budget | None:
        """Whose money it costs: nobody's, as soon as somebody reads."""
        return self._sponsors[0] if self._sponsors and not self._readers else None

    def want_whole(self) -> None:
        if not self.is_whole_wanted:
            self.is_whole_wanted = True
            self._driver_news.set()

    def ledger(self, address: str) -> Ledger:
        known_streamer = self._partial is not None and address in self._partial.readers
        return self._engine.ledger(self.blob, address, known_streamer=known_streamer)

    async def note_reader(self, address: str) -> None:
        if self._partial is not None and address not in self._partial.readers:
            try:
                await self._run(self._store.note_reader, self._partial, address)
            except StoreFull as exc:  # no reason to cut it; while this process lives, its ledger knows
                log.warning("%s reads %s unverified: %s", address, self.blob, exc)

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error

    async def divert(self, reader: Reader) -> Passage:
        """How a reader goes on when this fill ended for want of room: what is here is not asked for again."""
        await self.done.wait()
        remains = None
        if self._partial is not None:
            there = self._partial.durable if self._is_doubtful else self.written
            remains = Remains(os.dup(self._partial.fd), there.copy(), self._hash.copy())
        rest = Span(reader.position, reader.span.stop)
        is_whole = len(reader.span) == self.size
        return self._engine.passage(self.source, rest, reader.address, detail="no-room", is_whole=is_whole, remains=remains)

    def can_serve(self, span: Span) -> bool:
        """Whether headers may be sent: everything is here, or this fill has an upstream that answers (no truncated 200)."""
        return (bool(span) and self.written.covers(span)) or (self._is_proved and self.error is None)

    def first_byte_wait_s(self) -> float | None:
        """How much longer the first byte waits for the whole to be verified; None: not at all (P1)."""
        if not (self._wants_whole or self.written.covers(Span(0, self.size))):
            return None
        now = time.monotonic()
        since_first = None if self._first_byte_at is None else now - self._first_byte_at
        since_start = now - self._started_at
        if not holds_first_byte(
            missing=self.size - self._began_with,
            received=self.written.count() - self._began_with,
            since_start_s=since_start,
            since_first_byte_s=since_first,
        ):
            return None
        return max(0.005, min(HOLD_S - since_start, 0.05))

    async def news_for_readers(self, timeout_s: float | None) -> None:
        """Until bytes came, verification ended, an error struck, or the time is over."""
        news = self._reader_news
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await news.wait()

    def _announce(self) -> None:
        """Wake all readers, now."""
        if self._announcement is not None:
            self._announcement.cancel()
            self._announcement = None
        self._unannounced = 0
        self._reader_news.set()
        self._reader_news = asyncio.Event()

    # — the driver ——————————————————————————————————————————————————————————————————————————————

    async def run(self) -> None:
        """Until complete and published, failed, or wanted by nobody. Cancelled: what is whole is committed, then it ends.

        Dying at any await leaves a partial blob that recovery can continue.
        """
        outcome = "stopped"
        try:
            outcome = await self._drive()
        except* NearhubError as group:
            self.error = _first_error(group)
            outcome = "full" if isinstance(self.error, StoreFull) else "failed"
        except* Exception as group:
            log.exception("fill of %s broke", self.blob, exc_info=group)
            self.error = NearhubError("the mirror failed on this file: see its log")
            outcome = "broken"
        finally:
            self.is_closing = True
            try:
                await uncancelled(self._settle())
            except StoreError as exc:
                self.error, outcome = exc, "failed"
            finally:
                try:
                    if self._is_promised:
                        await uncancelled(self._engine.space.settle(self.blob))
                finally:
                    self._end(outcome)

    def _end(self, outcome: str) -> None:
        """The last word, whatever happened before: nobody may wait for a fill that is no more."""
        if self.error is None and not self.is_verified and self._readers:
            self.error = UpstreamFailed("the mirror is shutting down")
        self._engine.ended(self, outcome)
        self.done.set()
        self._announce()
        self._close_files()

    async def _drive(self) -> str:
        await self._open()
        if self.is_verified:
            return "complete"
        async with asyncio.TaskGroup() as tasks:
            committer = tasks.create_task(self._commit_blocks())
            verifier = tasks.create_task(self._verify())
            while not self.is_verified:
                self._driver_news.clear()
                if not self._is_idle():
                    wait_s = self._launch(tasks)
                elif self._flights:
                    self._land()
                    wait_s = None
                else:
                    break
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._driver_news.wait()
            # No await since the decision: whoever comes now waits for the end, and begins anew or finds the complete blob.
            self.is_closing = True
            for task in (verifier, committer, *(flight.task for flight in self._flights if flight.task)):
                task.cancel()
        if not self.is_verified:
            return "stopped"
        return "complete"

    async def _open(self) -> None:
        self._complete_fd = await self._run(self._store.open_complete, self.blob)
        if self._complete_fd is not None:
            self.written.add(Span(0, self.size))
            self.is_verified = True
            self._announce()
            return
        self._is_promised = True
        if not await self._engine.space.admit(self.blob, self.size):
            raise StoreFull(f"no room for the {self.size} bytes of {self.source.target}")
        self._partial = await self._run(self._store.open_partial, self.blob, self.size)
        for span in self._partial.durable:
            self.began_empty = False
            self.written.add(span)
            self._claimed.add(span)
            self._queued.update(blocks_touching(span, self._store.block))
        self._began_with = self.written.count()
        self._announce()

    def _is_idle(self) -> bool:
        """Nobody reads, and what is left to fetch is not worth going on for (P4)."""
        if self._readers or self._sponsors:
            return False
        return not planner.goes_on_orphaned(
            size=self.size, present=self.written.count(), whole=self.is_whole_wanted, orphan_limit=self._engine.orphan_limit
        )

    def _land(self) -> None:
        """Flights end with the block they are in. A reader that comes meanwhile finds the fill as it was."""
        for flight in self._flights:
            flight.stop = min(flight.stop, block_end(flight.position, self.size, self._store.block))

    def _launch(self, tasks: asyncio.TaskGroup) -> float | None:
        """Start what the planner orders; returns in how many seconds it must be asked again at the latest."""
        now = time.monotonic()
        if now < self._not_before:
            return self._not_before - now
        for order in self._orders(now):
            flight = Flight(order.span.start, order.span.stop, self._owner, order.is_hedge)
            self._flights[flight] = None
            self.has_flown = True
            if order.is_hedge:
                for other in self._flights:
                    if other is not flight and other.position == flight.position:
                        other.is_hedged = True
            flight.lane = order.lane if self._sponsor is None else Lane.PREFETCH
            flight.task = tasks.create_task(self._fly(flight))
        silences = [now - f.heard_at for f in self._flights if f.heard_at is not None and not f.is_hedged and not f.is_hedge]
        return max(0.05, self._patience.hedge_after_s - max(silences)) if silences else None

    def _orders(self, now: float) -> list[Order]:
        if self._is_sequential:
            # Upstream ignores Range: one request from the start, and what is here already is skipped.
            start = self.written.end_of_run(0)
            is_due = not self._flights and start < self.size
            return [Order(Span(start, self.size), Lane.BULK)] if is_due else []
        is_alone = bool(self._flights) and not self._is_proved
        if is_alone:
            return []
        wanted = SpanSet([Span(0, self.size)]) if self._wants_whole else SpanSet(self._readers.values())
        connections = self._engine.connections
        if self._sponsor is not None:
            connections = min(connections, self._engine.dispatcher.slots(Lane.PREFETCH).limit)
        orders = planner.plan(
            size=self.size,
            written=self._claimed,
            wanted=wanted,
            needs=[Need(reader.position, reader.span.stop) for reader in self._readers],
            flights=[f.seen(now) for f in self._flights],
            room=connections - len(self._flights),
            span_blocks=planner.order_blocks(self._rate, self._store.block),
            block=self._store.block,
            hedge_after_s=self._patience.hedge_after_s,
        )
        # The first answer shows where the bytes are and whether ranges are honoured: the others wait for it.
        return orders if self._is_proved else orders[:1]

    # — one request ————————————————————————————————————————————————————————————————————————————

    async def _fly(self, flight: Flight) -> None:
        upstream: Upstream | None = None
        try:
            async with self._engine.dispatcher.place(flight.lane, flight.client, self.blob):
                flight.is_queued = False
                flight.position = min(flight.stop, max(flight.position, self._claimed.end_of_run(flight.position)))
                if flight.position == flight.stop:
                    return
                flight.heard_at = time.monotonic()
                self._driver_news.set()  # from now on its silence counts
                upstream = self._pick(flight)
                self._engine.metrics.upstream_requests.labels("hedge" if flight.is_hedge else "fill").inc()
                span, location = Span(flight.position, flight.stop), self._locations.get(upstream)
                async with upstream.fetch(self.source.target, self.source.meta, span, location) as body:
                    self._engine.dispatcher.succeeded(upstream)
                    await self._receive(flight, upstream, body)
        except (UpstreamError, HubRefusal) as exc:
            self._bear(exc, flight, upstream)
        finally:
            self._flights.pop(flight, None)
            self._driver_news.set()

    def _pick(self, flight: Flight) -> Upstream:
        """The best upstream; for a hedge the next best, when there is one."""
        candidates = self._engine.dispatcher.candidates(about=self.source.target.repo)
        if not candidates:
            raise self._engine.dispatcher.why_none(about=self.source.target.repo)
        return candidates[1] if flight.is_hedge and len(candidates) > 1 else candidates[0]

    async def _receive(self, flight: Flight, upstream: Upstream, body: Body) -> None:
        self._locations[upstream] = body.location
        if not self._is_proved:
            self._is_proved = True
            self._driver_news.set()
        offset = body.span.start
        if offset < flight.position or body.span.stop > flight.stop:
            self._is_sequential = True
            flight.stop = body.span.stop
        started_at = window_at = time.monotonic()
        window_bytes = 0
        async for chunk in body.chunks():
            flight.heard_at = now = time.monotonic()
            flight.received += len(chunk)
            window_bytes += len(chunk)
            kind = "hedge" if flight.is_hedge else "fill"
            self._engine.metrics.upstream_bytes.labels(kind).inc(len(chunk))
            flight.heard_at = None  # while the disk has it, the upstream is not silent
            await self._take(chunk, offset)
            if (sponsor := self._sponsor) is not None:
                await sponsor.spend(len(chunk))
                window_at, window_bytes = time.monotonic(), 0  # whoever is slow, it is not the upstream
            flight.heard_at = time.monotonic()
            offset += len(chunk)
            flight.position = max(flight.position, offset)
            if offset >= flight.stop or self._claimed.end_of_run(offset) >= flight.stop:
                break
            if (elapsed := now - window_at) >= self._patience.rate_window_s:
                if window_bytes < self._patience.min_rate * elapsed:
                    raise UpstreamFailed(f"{upstream.url} drips: {window_bytes / elapsed:.0f} bytes/s")
                window_at, window_bytes = now, 0
        self._progress()
        if (elapsed := time.monotonic() - started_at) > 0:
            self._rate = flight.received / elapsed if not self._rate else 0.5 * self._rate + 0.5 * flight.received / elapsed

    async def _take(self, chunk: bytes, offset: int) -> None:
        """Write what of `chunk` nobody has written or is writing."""
        if self._first_byte_at is None:
            self._first_byte_at = time.monotonic()
            self._announce()
        assert self._partial is not None
        view = memoryview(chunk)
        for span in list(self._claimed.missing(Span(offset, offset + len(chunk)))):
            self._claimed.add(span)
            await self._write(span, view[span.start - offset : span.stop - offset])
        # P8: what a crash loses is bounded by this, also on a disk that is slower than the network.
        while len(self._to_commit) + len(self._committing) > self._engine.connections:
            self._committed.clear()
            await self._committed.wait()

    async def _write(self, span: Span, piece: memoryview) -> None:
        """Raises StoreFull when there is no room, and none could be made."""
        space = self._engine.space
        for attempt in range(1 + RELIEFS):
            since = space.evictions
            write = self._start_io(self._store.write, self._partial, span.start, [piece])
            # Also when this flight is cancelled meanwhile: the bytes are claimed, so they must become written.
            write.add_done_callback(functools.partial(self._wrote, span))
            try:
                return await asyncio.shield(write)
            except StoreFull:
                if attempt == RELIEFS or not await space.relieve(self._store.block, since=since):
                    raise

    def _wrote(self, span: Span, write: asyncio.Future[None]) -> None:
        if write.cancelled() or write.exception() is not None:
            return
        self.written.add(span)
        self._engine.space.wrote(self.blob, len(span))
        for index in blocks_touching(span, self._store.block):
            if index not in self._queued and self.written.covers(block_span(index, self.size, self._store.block)):
                self._queued.add(index)
                self._to_commit.append(index)
                self._commits.set()
        self._unannounced += len(span)
        if self._unannounced >= WAKE_BYTES:
            self._announce()
        elif self._announcement is None:
            self._announcement = asyncio.get_running_loop().call_later(WAKE_S, self._announce)

    def _bear(self, exc: UpstreamError | HubRefusal, flight: Flight, upstream: Upstream | None) -> None:
        """A request failed: go on after a pause, or give the fill up by raising."""
        now = time.monotonic()
        log.info("fill of %s: %s", self.blob, exc)
        if isinstance(exc, Offline):
            raise exc
        exc = self._engine.dispatcher.judge(exc, upstream)
        if upstream is not None:
            self._locations.pop(upstream, None)
        if flight.received >= PROGRESS_BYTES:
            self._progress()
            return
        if flight.is_hedge or now < self._not_before:
            return
        if isinstance(exc, UpstreamBusy):
            self._wait_for_busy(exc, upstream, now)
            return
        self._strikes += 1
        if self._strikes > (self._patience.strikes if self._is_proved else self._patience.strikes_unproved):
            raise exc
        self._not_before = now + self._patience.first_backoff_s * 2.0 ** (self._strikes - 1) * random.uniform(0.8, 1.2)

    def _wait_for_busy(self, exc: UpstreamBusy, upstream: Upstream | None, now: float) -> None:
        """Nobody else to ask: wait as long as upstream said, if that is short; else its word goes to the clients (B9)."""
        if any(other is not upstream for other in self._engine.dispatcher.candidates(about=self.source.target.repo)):
            return
        if self._busy_since is None:
            self._busy_since = now
        wait_s = max(exc.retry_after_s, self._patience.first_backoff_s)
        if now + wait_s - self._busy_since > SHORT_WAIT_S:
            raise exc
        self._not_before = now + wait_s

    def _progress(self) -> None:
        self._strikes = 0
        self._busy_since = None

    # — durability and verification —————————————————————————————————————————————————————————————

    async def _commit_blocks(self) -> None:
        """Blocks become durable, several per sync, while more arrive."""
        while True:
            await self._commits.wait()
            self._commits.clear()
            self._committing, self._to_commit = self._to_commit, []
            await self._run(self._commit, self._committing)
            self._committing = []
            self._committed.set()

    def _commit(self, blocks: list[int]) -> None:
        """In a thread."""
        assert self._partial is not None
        try:
            self._store.commit(self._partial, blocks)
        except StoreFull:
            self._is_doubtful = True
            raise

    async def _verify(self) -> None:
        """Hash behind the contiguous prefix, in a thread. Sets is_verified, or quarantines and raises UpstreamLied."""
        while self._hash.position < self.size:
            end = self.written.end_of_run(self._hash.position)
            is_worth_it = self._wants_whole or self.written.covers(Span(0, self.size))
            if end == self._hash.position or not is_worth_it:
                await self.news_for_readers(None)
                continue
            end = min(end, self._hash.position + HASH_BYTES)
            await self._run(self._hash.read, self.fd, end, pool=self._engine.hashing)
        if self._hash.matches():
            self.is_verified = True
            self._announce()
            self._driver_news.set()
            return
        await self._reject()

    async def _reject(self) -> None:
        """Wrong bytes (B5): recorded on disk before anybody can fetch again; readers are cut; alarm."""
        assert self._partial is not None
        self.is_closing = True
        with contextlib.suppress(StoreFull):  # no reason to forget what was found
            await self._settle()
        streamed = self._engine.streamers(self.blob)
        mismatch = await self._run(self._store.quarantine, self._partial, streamed)
        self._engine.metrics.mismatches.inc()
        log.error(
            "%s failed verification (failure %d in 24 h): what %s sent for %s is in quarantine",
            self.blob,
            mismatch.count,
            ", ".join(upstream.url for upstream in self._engine.dispatcher.upstreams),
            self.source.target,
        )
        raise UpstreamLied(f"upstream sent wrong bytes for {self.source.target}: they were put aside; try again")

    # — threads, files ————————————————————————————————————————————————————————————————————————————

    def _start_io(self, call: Callable[..., T], *args: object, pool: ThreadPoolExecutor | None = None) -> asyncio.Future[T]:
        future = asyncio.get_running_loop().run_in_executor(pool or self._engine.io, functools.partial(call, *args))
        self._io.add(future)  # type: ignore[arg-type]
        future.add_done_callback(self._io.discard)
        return future

    async def _run(self, call: Callable[..., T], *args: object, pool: ThreadPoolExecutor | None = None) -> T:
        """In a thread. Cancelled: the thread finishes all the same, and _settle waits for it."""
        return await asyncio.shield(self._start_io(call, *args, pool=pool))

    async def _quiet(self) -> None:
        """No thread of this fill is at work. Not cancellable."""
        while self._io:
            await uncancelled(asyncio.wait(list(self._io)))  # a snapshot: threads that end shrink the set

    async def _settle(self) -> None:
        """No thread is at work, and what was won is durable: a verified blob is published, else whole blocks are committed.

        Not if the bytes or the disk are not to be believed. To be run uncancelled: a stop must not throw a blob away.
        """
        await self._quiet()
        if self._partial is not None and self.is_verified:
            await self._run(self._store.publish, self._partial)
            return
        if self._partial is not None and not isinstance(self.error, (StoreError, UpstreamLied)):
            blocks, self._to_commit = self._to_commit, []
            if blocks:
                await self._run(self._commit, blocks)

    def _close_files(self) -> None:
        if not self.done.is_set() or self._readers:
            return
        if self._partial is not None:
            partial, self._partial = self._partial, None
            self._store.close(partial)
        if self._complete_fd is not None:
            os.close(self._complete_fd)
            self._complete_fd = None


class FillEngine:
    """Owner of all Fills and Passages. `connections` per blob; `orphan_limit` in bytes (P4)."""

    def __init__(
        self,
        store: BlobStore,
        space: Space,
        dispatcher: Dispatcher,
        metrics: Metrics,
        *,
        connections: int = 16,
        orphan_limit: int = 4 * 1024**3,
        patience: Patience | None = None,
    ) -> None:
        self.store = store
        self.space = space
        self.dispatcher = dispatcher
        self.metrics = metrics
        self.connections = connections
        self.orphan_limit = orphan_limit
        self.patience = patience or Patience()
        self.io = ThreadPoolExecutor(8, "nearhub-io")
        self.hashing = ThreadPoolExecutor(2, "nearhub-hash")
        self.on_complete: Callable[[BlobId], None] = lambda blob: None
        """Called when all of a blob is here and right."""
        self._fills: dict[BlobId, Fill] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ledgers: OrderedDict[BlobId, dict[str, Ledger]] = OrderedDict()
        self._is_closed = False
        places = max(1, dispatcher.slots(Lane.BULK).limit // 2)
        self._route = Route(
            dispatcher=dispatcher,
            places=Slots(places, places),
            store=store,
            metrics=metrics,
            io=self.io,
            hashing=self.hashing,
            spawn=self._spawn,
            first_backoff_s=self.patience.first_backoff_s,
            strikes=self.patience.strikes,
        )

    def __repr__(self) -> str:
        return f"<FillEngine {list(self._fills.values())}>"

    @property
    def running(self) -> list[Fill]:
        """The fills under way."""
        return list(self._fills.values())

    async def open(self, source: Source | LfsSource, asked: Asked, address: str) -> Reading:
        """A reader of `asked`: of the complete blob, or attached to its fill, which is begun if need be. Of a blob that is
        larger than the cache: a passage.

        Raises UpstreamLied while a blob that failed verification repeatedly is left alone, and for a size that cannot be.
        """
        blob = source.meta.blob
        while True:
            fill = self._fills.get(blob)
            if fill is None:
                fd = await asyncio.get_running_loop().run_in_executor(self.io, self.store.open_complete, blob)
                if fd is not None:
                    if os.fstat(fd).st_size != source.meta.size:
                        os.close(fd)
                        raise _other_size(source)
                    self.space.used(blob, fd)
                    self.metrics.readers_active.inc()
                    trace.note(f"content: {blob} is complete here")
                    return Reader(asked, source.meta.size, address, fd=fd, on_close=self.metrics.readers_active.dec)
                self._refuse_what_nobody_brings(source)
                if not self.space.could_hold(source.meta.size):
                    self._refuse_repeated_mismatch(source)
                    is_whole = len(asked.span) == source.meta.size
                    return self.passage(source, asked.span, address, detail="too-large", is_whole=is_whole)
                fill = self._fills.get(blob) or self._begin(source)
            if fill.size != source.meta.size:
                raise _other_size(source)
            if not fill.is_closing:
                trace.note(f"content: a fill brings it: {fill!r}")
                return fill.attach(asked, address, source)
            await fill.done.wait()

    async def require(self, source: Source | LfsSource) -> None:
        """Raises Offline where the blob is not here whole, and there is nobody to bring the rest."""
        if not self.dispatcher.connectivity.is_offline:
            return
        if not await asyncio.get_running_loop().run_in_executor(self.io, self.store.path_of(source.meta.blob).exists):
            self._refuse_what_nobody_brings(source)

    def _refuse_what_nobody_brings(self, source: Source | LfsSource) -> None:
        connectivity = self.dispatcher.connectivity
        if connectivity.is_offline and not self.dispatcher.candidates(about=source.target.repo):
            raise Offline(f"{source.target} is not in this mirror, or not all of it: {connectivity.error().message}")

    async def bring(self, source: Source | LfsSource, budget: Budget, address: str) -> AsyncGenerator[int]:
        """All of a blob into the store, for nobody in particular. Yields how many of its bytes are here: at first, and as it
        goes.

        Raises what made it impossible; StoreFull for a blob that there is no room for. Closed early: the fill is left alone.
        """
        blob, size = source.meta.blob, source.meta.size
        loop = asyncio.get_running_loop()
        yield min(size, (await loop.run_in_executor(self.io, self.store.held, blob)).bytes)
        while not await loop.run_in_executor(self.io, self.store.path_of(blob).exists):
            self._refuse_what_nobody_brings(source)
            if not self.space.could_hold(size):
                raise StoreFull(f"{source.target} has {size} bytes, more than the whole cache may have")
            fill = self._fills.get(blob) or self._begin(source, address)
            if fill.size != size:
                raise _other_size(source)
            with contextlib.nullcontext() if fill.is_closing else fill.sponsored(budget):
                while not fill.done.is_set():
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(BRING_NEWS_S):
                            await fill.done.wait()
                    yield fill.written.count()
            fill.raise_error()
        yield size

    def _begin(self, source: Source | LfsSource, owner: str = "") -> Fill:
        if self._is_closed:
            raise UpstreamFailed("the mirror is shutting down")
        self._refuse_repeated_mismatch(source)
        fill = self._fills[source.meta.blob] = Fill(self, source, owner)
        self._spawn(fill.run(), f"fill {fill.blob}")
        self.metrics.fills_active.inc()
        return fill

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def passage(
        self,
        source: Source | LfsSource,
        span: Span,
        address: str,
        *,
        detail: str,
        is_whole: bool,
        remains: Remains | None = None,
    ) -> Passage:
        """For one response, without storing."""
        self.metrics.streamed_through.labels(detail).inc()
        trace.note(f"content: streams through, not stored: {detail}")
        log.info("%s streams through to %s (%s, %d bytes)", source.target, address, detail, len(span))
        return Passage(
            self._route, source.target, source.meta, span, address, detail=detail, is_whole=is_whole, remains=remains
        )

    def _refuse_repeated_mismatch(self, source: Source | LfsSource) -> None:
        """After a second failure in a row, wait 30 s, 1 min, 2 min … before wrong bytes are downloaded again."""
        mismatch = self.store.mismatch(source.meta.blob)
        if mismatch is None or mismatch.count < 2:
            return
        wait_s = mismatch.at + min(3600.0, 30.0 * 2.0 ** (mismatch.count - 2)) - self.store.clock()
        if wait_s > 0:
            raise UpstreamLied(
                f"upstream sent wrong bytes for {source.target} {mismatch.count} times; the next try is in {wait_s:.0f} s"
            )

    def ended(self, fill: Fill, outcome: str) -> None:
        """The fill's last word; from here on a new one may begin."""
        if self._fills.get(fill.blob) is fill:
            del self._fills[fill.blob]
        if fill.is_verified or isinstance(fill.error, UpstreamLied):
            self._ledgers.pop(fill.blob, None)
        if fill.is_verified:
            self.on_complete(fill.blob)
        self.metrics.fills.labels(outcome).inc()
        self.metrics.fills_active.dec()

    def ledger(self, blob: BlobId, address: str, *, known_streamer: bool) -> Ledger:
        ledgers = self._ledgers.setdefault(blob, {})
        self._ledgers.move_to_end(blob)
        while len(self._ledgers) > MAX_LEDGERS:
            self._ledgers.popitem(last=False)
        if address not in ledgers:
            ledgers[address] = Ledger(FOOTER, streamed=True) if known_streamer else Ledger()
        return ledgers[address]

    def streamers(self, blob: BlobId) -> list[str]:
        """Addresses that were sent unverified bytes of it, beyond footers."""
        return [address for address, ledger in self._ledgers.get(blob, {}).items() if ledger.streamed]

    def caution(self, blob: BlobId, address: str) -> Caution:
        """What P1b must know of this blob and this client."""
        mismatch = self.store.mismatch(blob)
        if mismatch is None:
            return Caution.NONE
        return Caution.TAINTED if address in mismatch.readers else Caution.MISMATCHED

    async def close(self) -> None:
        """End all fills; what is whole is durable when this returns."""
        self._is_closed = True
        for task in self._tasks:
            task.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)
        self.io.shutdown()
        self.hashing.shutdown()


def _other_size(source: Source | LfsSource) -> UpstreamLied:
    return UpstreamLied(f"upstream says {source.target} has {source.meta.size} bytes, which content {source.meta.blob} has not")


def _first_error(group: BaseExceptionGroup[NearhubError]) -> NearhubError:
    for exc in group.exceptions:
        return _first_error(exc) if isinstance(exc, BaseExceptionGroup) else exc
    raise AssertionError("an exception group is never empty")
