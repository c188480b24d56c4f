"""Passage: one response's own way to the bytes of a blob that is not stored, because it is too large for the cache or because
there is no room now. What an earlier fill left is read from disk, the rest comes from upstream, and nothing is written.

A whole blob is hashed on the way and its last 64 KiB wait for the result (P1); of a range nothing can be verified. The newest
64 KiB are held back all the while, so that something can be dripped while upstream is silent.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import random
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from nearhub.digest import BlobHash
from nearhub.errors import HubRefusal, NearhubError, StoreFailed, UpstreamBusy, UpstreamError, UpstreamFailed, UpstreamLied
from nearhub.metrics import Metrics
from nearhub.planner import Lane
from nearhub.release import DRIP, DRIP_EVERY_S, TAIL
from nearhub.store.blobs import BlobStore
from nearhub.tasks import uncancelled
from nearhub.upstream.client import Body, Location, Upstream
from nearhub.upstream.dispatch import Dispatcher, Slots
from nearhub.wire.cachestatus import CacheStatus, Forward
from nearhub.wire.headers import FileMetadata, ObjectMetadata
from nearhub.wire.spans import Span, SpanSet
from nearhub.wire.target import FileTarget, LfsTarget

log = logging.getLogger(__name__)
T = TypeVar("T")

PLACE_WAIT_S = 8.0
"""A client that has not heard anything gives up after 10 s: so long it waits for a connection, then it hears 503."""
BUSY_RETRY_S = 10.0
SHORT_WAIT_S = 5.0
"""An upstream that asks for a longer wait than this is given up instead of holding its readers."""
PROGRESS_BYTES = 64 * 1024
"""A request that brought this much before it failed was worth it: the next one follows without a pause."""
_READ = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Route:
    """What all passages share. `places`: how many there may be at once; fills need connections too."""

    dispatcher: Dispatcher
    places: Slots
    store: BlobStore
    metrics: Metrics
    io: ThreadPoolExecutor
    hashing: ThreadPoolExecutor
    spawn: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]]
    first_backoff_s: float
    strikes: int


@dataclass(frozen=True, slots=True)
class Remains:
    """What a fill left: a descriptor that the passage owns, which bytes may be read from it, and the hash so far."""

    fd: int
    there: SpanSet
    digest: BlobHash


class Passage:
    """Use: `await ready()`, then `await next_piece()` until None, then close(). The client's leaving closes upstream."""

    def __init__(
        self,
        route: Route,
        target: FileTarget | LfsTarget,
        meta: FileMetadata | ObjectMetadata,
        span: Span,
        address: str,
        *,
        detail: str,
        is_whole: bool,
        remains: Remains | None = None,
    ) -> None:
        """Of `span`; `is_whole`: before it the response has sent the blob's bytes up to there, and it goes on to the end."""
        self._route = route
        self._target = target
        self._meta = meta
        self._stop = span.stop
        self._address = address
        self._detail = detail
        self._fd = remains.fd if remains else -1
        self._there = remains.there if remains else SpanSet()
        self._digest: BlobHash | None = None
        if is_whole:
            self._digest = remains.digest if remains else BlobHash(meta.blob, meta.size)
        self._locations: dict[Upstream, Location] = {}
        self._validator: str | None = None
        self._taken = span.start
        """Up to here the bytes have come; the last of them are in `_back`."""
        self._back = bytearray()
        self._piece: bytes | None = None
        self._room = asyncio.Event()
        self._room.set()
        self._news = asyncio.Event()
        self._is_over = False
        self._error: NearhubError | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<Passage {self._meta.blob} {self._taken} of {self._stop} for {self._address}>"

    @property
    def status(self) -> CacheStatus:
        return CacheStatus(Forward.URI_MISS, detail=self._detail if self._digest else "unverified")

    # — for the response ————————————————————————————————————————————————————————————————————————

    async def ready(self, *, is_first: bool = True) -> None:
        """Wait until there is something to send, so that an error is still a clean answer. Raises NearhubError."""
        if not is_first:
            return
        self._begin()
        while self._piece is None and not self._is_over:
            await self._hear(None)
        if self._piece is None and self._error is not None:
            raise self._error

    async def next_piece(self) -> bytes | None:
        """The next bytes; None at the end. Raises NearhubError: then the connection must be cut."""
        self._begin()
        while True:
            if self._piece is not None:
                piece, self._piece = self._piece, None
                self._room.set()
                return piece
            if self._error is not None:
                raise self._error
            if self._is_over:
                return None
            if not await self._hear(DRIP_EVERY_S) and (drip := self._drip()):
                return drip

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._task is not None:
            self._task.cancel()
        else:
            self._close_file()

    def _begin(self) -> None:
        if self._task is None:
            self._task = self._route.spawn(self._run(), f"passage {self._meta.blob}")
            self._task.add_done_callback(lambda _: self._close_file())  # also if it is cancelled before it ran

    def _close_file(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    async def _hear(self, timeout_s: float | None) -> bool:
        """Until there is a piece, or no more; False when the time is over."""
        self._news.clear()
        if self._piece is None and not self._is_over:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._news.wait()
        return self._news.is_set()

    def _drip(self) -> bytes:
        """A little of what is held back, but never of the end of a blob that is not verified."""
        sent = self._taken - len(self._back)
        bound = self._stop - TAIL if self._digest else self._stop
        count = max(0, min(DRIP, len(self._back), bound - sent))
        drip = bytes(self._back[:count])
        del self._back[:count]
        return drip

    # — the task ————————————————————————————————————————————————————————————————————————————————

    async def _run(self) -> None:
        error: NearhubError | None = UpstreamFailed("the mirror is shutting down")
        try:
            await self._bring()
            error = None
        except NearhubError as exc:
            log.info("passage of %s: %s", self._meta.blob, exc)
            error = exc
        except Exception:
            log.exception("passage of %s broke", self._meta.blob)
            error = NearhubError("the mirror failed on this file: see its log")
        finally:
            self._error = error
            self._is_over = True
            self._news.set()

    async def _bring(self) -> None:
        position = self._taken if self._digest is None else min(self._taken, self._digest.position)
        while position < self._stop:
            gap = next(self._there.missing(Span(position, self._stop)), Span(self._stop, self._stop))
            if gap.start > position:
                await self._read(Span(position, gap.start))
            else:
                await self._fetch(gap)
            position = gap.start if gap.start > position else gap.stop
        if self._digest is not None and not self._digest.matches():
            await self._reject()
        if self._back:
            await self._give(bytes(self._back))

    async def _read(self, span: Span) -> None:
        """From what the fill left."""
        for start in range(span.start, span.stop, _READ):
            count = min(_READ, span.stop - start)
            data = await self._in_thread(self._route.io, os.pread, self._fd, count, start)
            if len(data) < count:
                raise StoreFailed("a partial blob's file is shorter than it was")
            await self._take(memoryview(data), start)

    async def _fetch(self, gap: Span) -> None:
        """From upstream: again, from where it broke, until all of it came or patience ends."""
        position, strikes = gap.start, 0
        async with contextlib.AsyncExitStack() as stack:
            await self._place(stack)
            while position < gap.stop:
                before, upstream = position, None
                try:
                    upstream = self._pick()
                    self._route.metrics.upstream_requests.labels("through").inc()
                    location = self._locations.get(upstream)
                    async with upstream.fetch(self._target, self._meta, Span(position, gap.stop), location) as body:
                        self._check(upstream, body)
                        offset = body.span.start
                        async for chunk in body.chunks():
                            self._route.metrics.upstream_bytes.labels("through").inc(len(chunk))
                            fresh = memoryview(chunk)[max(0, position - offset) :][: gap.stop - position]
                            await self._take(fresh, position)
                            position += len(fresh)
                            offset += len(chunk)
                            if position == gap.stop:
                                break
                except (UpstreamError, HubRefusal) as exc:
                    strikes = 0 if position - before >= PROGRESS_BYTES else strikes + 1
                    await self._bear(exc, upstream, strikes)

    async def _place(self, stack: contextlib.AsyncExitStack) -> None:
        """Among the passages, and among the connections. With nothing to drip it waits no longer than its client would."""
        try:
            async with asyncio.timeout(None if self._back else PLACE_WAIT_S):
                for slots in (self._route.places, self._route.dispatcher.slots(Lane.BULK)):
                    await stack.enter_async_context(slots.hold(self._address, self._meta.blob))
        except TimeoutError:
            raise UpstreamBusy(
                "all connections to upstream are taken, and there is no room to store this file",
                retry_after_s=BUSY_RETRY_S,
                status=503,
            ) from None

    def _pick(self) -> Upstream:
        candidates = self._route.dispatcher.candidates(about=self._target.repo)
        if not candidates:
            raise self._route.dispatcher.why_none(about=self._target.repo)
        return candidates[0]

    def _check(self, upstream: Upstream, body: Body) -> None:
        """Bytes of two objects must not be joined where no hash will tell."""
        self._route.dispatcher.succeeded(upstream)
        self._locations[upstream] = body.location
        validator = body.location.validator
        if self._digest is None and validator and self._validator not in (None, validator):
            raise UpstreamLied(f"{upstream.url} has another object for {self._target} than it began with")
        self._validator = validator or self._validator

    async def _bear(self, exc: UpstreamError | HubRefusal, upstream: Upstream | None, strikes: int) -> None:
        """A request failed: return after a pause, or give up by raising."""
        log.info("passage of %s: %s", self._meta.blob, exc)
        exc = self._route.dispatcher.judge(exc, upstream)
        if upstream is not None:
            self._locations.pop(upstream, None)
        pause_s = 0.0
        if strikes:
            pause_s = self._route.first_backoff_s * 2.0 ** (strikes - 1) * random.uniform(0.8, 1.2)
        others = self._route.dispatcher.candidates(about=self._target.repo)
        if isinstance(exc, UpstreamBusy) and all(other is upstream for other in others):
            pause_s = max(pause_s, exc.retry_after_s)
        if strikes > self._route.strikes or pause_s > SHORT_WAIT_S:
            raise exc
        await asyncio.sleep(pause_s)

    async def _take(self, data: memoryview, start: int) -> None:
        """Bytes have come: hash what is not hashed, hold the newest back, and give the others to the response."""
        if self._digest is not None and (unhashed := data[max(0, self._digest.position - start) :]):
            await self._in_thread(self._route.hashing, self._digest.update, unhashed)
        fresh = data[max(0, self._taken - start) :]
        self._back += fresh
        self._taken += len(fresh)
        if (count := len(self._back) - TAIL) > 0:
            piece = bytes(self._back[:count])
            del self._back[:count]
            await self._give(piece)

    async def _give(self, piece: bytes) -> None:
        """Wait until the response has taken the piece before: a slow client slows upstream down."""
        await self._room.wait()
        self._room.clear()
        self._piece = piece
        self._news.set()

    async def _reject(self) -> None:
        mismatch = await self._in_thread(self._route.io, self._route.store.record_mismatch, self._meta.blob, [self._address])
        self._route.metrics.mismatches.inc()
        log.error("%s failed verification (failure %d in 24 h) as it streamed through", self._meta.blob, mismatch.count)
        raise UpstreamLied(f"upstream sent wrong bytes for {self._target}: the rest was withheld; try again")

    async def _in_thread(self, pool: ThreadPoolExecutor, call: Callable[..., T], *args: object) -> T:
        """To the end, even if the client leaves: the descriptor and the buffers are in use until then."""
        return await uncancelled(asyncio.get_running_loop().run_in_executor(pool, functools.partial(call, *args)))
