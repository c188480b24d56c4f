"""SiteCache: what sites said, kept as wire/http_cache.py decides. Owner of the index's `site` rows.

A row tells what a body is; it is written when the body is durable, so after a crash there is at most a body that nobody reads.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace

from nearhub import trace
from nearhub.connectivity import Connectivity
from nearhub.errors import StoreFailed
from nearhub.metrics import Metrics
from nearhub.single_flight import SingleFlight
from nearhub.store.eviction import Space
from nearhub.store.index import Index
from nearhub.store.site_bodies import NewBody, SiteBodies, SiteBody
from nearhub.tasks import uncancelled
from nearhub.upstream.sites import SiteAnswer, SiteClient
from nearhub.wire import http_cache
from nearhub.wire.fields import Fields
from nearhub.wire.http_cache import Stored
from nearhub.wire.sites import Site, passed_on, sent_to

log = logging.getLogger(__name__)

MAX_ROWS = 100_000
MAX_VARIANTS = 32
MAX_UNANNOUNCED = 64 * 1024**2
"""Bytes that are kept of a body that did not say how long it is."""
_PRUNE_EVERY = 64
_PREFIX = "site "


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of a site: GET of `tail` behind its URL, by a client that sent `fields`."""

    site: Site
    tail: str
    fields: Fields
    authorization: str | None = None

    @property
    def url(self) -> str:
        return self.site.url + self.tail

    @property
    def prefix(self) -> str:
        """Of the keys of its rows."""
        return f"{_PREFIX}{hashlib.sha256(f'{self.site.name} {self.url}'.encode()).hexdigest()} "

    def sent(self, conditions: list[tuple[str, str]]) -> Fields:
        return sent_to(self.fields, self.authorization, conditions)


@dataclass(slots=True)
class Found:
    """A stored answer with its body open. close() it."""

    stored: Stored
    fd: int

    def close(self) -> None:
        os.close(self.fd)


class SiteCache:
    """Clock: wall seconds."""

    def __init__(
        self,
        client: SiteClient,
        connectivity: Connectivity,
        bodies: SiteBodies,
        index: Index,
        space: Space,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.clock = clock
        self._client = client
        self._connectivity = connectivity
        self._bodies = bodies
        self._index = index
        self._space = space
        self._metrics = metrics
        self._refreshing = SingleFlight(clock)
        self._puts = 0

    async def find(self, question: Question) -> Found | None:
        """The newest answer that fits, whether or not it is fresh."""
        rows = await self._index.run(self._index.scan, question.prefix, limit=MAX_VARIANTS)
        known = sorted((Stored.read(row) for _, row in rows), key=lambda stored: stored.got_at, reverse=True)
        stored = next((stored for stored in known if http_cache.fits(question.fields, stored)), None)
        if stored is None:
            return None
        body = SiteBody(stored.body)
        fd = await asyncio.to_thread(self._bodies.open, body, stored.size)
        if fd is None:
            trace.note("what was stored of this was evicted")
            return None
        self._space.touched(body)
        return Found(stored, fd)

    async def freshen(self, question: Question, stored: Stored, answer: SiteAnswer, asked_at: float) -> Stored | None:
        """After a 304: `stored` as it holds from now on. None: the 304 is about something else."""
        fresh = http_cache.freshened(stored, passed_on(answer.fields), asked_at, self.clock())
        if fresh is not None:
            await self.put(question, fresh)
        return fresh

    async def keeping(self, question: Question, sent: Fields, answer: SiteAnswer, asked_at: float) -> Keeping | None:
        """What stores this answer to GET as its body comes; None: it must not or cannot be stored."""
        fields = passed_on(answer.fields)
        limit = question.site.max_file_bytes
        if not answer.is_delimited or not http_cache.may_store(sent, answer.status, fields):
            return None
        size = MAX_UNANNOUNCED if answer.length is None else answer.length
        if not self._space.could_hold(size) or (answer.length is not None and limit is not None and size > limit):
            return None
        size = size if limit is None else min(size, limit)
        variant = http_cache.variant_of(question.fields, fields)
        stored = Stored(answer.status, fields, variant, asked_at, self.clock(), self._bodies.new_name().name, 0)
        keeping = Keeping(self, self._bodies, self._space, question, stored, size)
        return keeping if await keeping.begin() else None

    def refresh_soon(self, question: Question, stored: Stored) -> None:
        """Ask the site again meanwhile (stale-while-revalidate); once, whoever asks."""
        self._refreshing.start(question.prefix + stored.variant, lambda: self._refresh(question, stored))

    async def _refresh(self, question: Question, stored: Stored) -> None:
        asked_at = self.clock()
        sent = question.sent(list(http_cache.validators(stored.fields).items()))
        async with self.ask("GET", question, sent) as answer:
            if answer.status == 304:
                await self.freshen(question, stored, answer, asked_at)
            elif (keeping := await self.keeping(question, sent, answer, asked_at)) is not None:
                async with keeping:
                    while data := await answer.read():
                        await keeping.write(data)
                    await keeping.keep()

    def ask(self, method: str, question: Question, sent: Fields) -> AbstractAsyncContextManager[SiteAnswer]:
        """One request to the site. Raises UpstreamError, also while nobody may be asked."""
        self._connectivity.require()
        self._metrics.upstream_requests.labels("site").inc()
        return self._client.ask(method, question.url, sent)

    async def put(self, question: Question, stored: Stored) -> None:
        """In place of what was stored for the same variant. Durable on return."""
        key = question.prefix + stored.variant
        before = await self._index.run(self._index.get, key)
        await self._index.run(self._index.put, key, stored.row())
        if before is not None and before["body"] != stored.body:
            await self._space.remove(SiteBody(before["body"]))
        self._puts += 1
        await self._index.run(self._index.prune, question.prefix, MAX_VARIANTS)
        if self._puts % _PRUNE_EVERY == 0:
            await self._index.run(self._index.prune, _PREFIX, MAX_ROWS)

    async def close(self) -> None:
        """End the questions under way."""
        await self._refreshing.close()


class Keeping:
    """One answer being stored: write() as its bytes come, keep() once they are all there. A disk that fails ends only this."""

    def __init__(
        self, cache: SiteCache, bodies: SiteBodies, space: Space, question: Question, stored: Stored, room: int
    ) -> None:
        self._cache = cache
        self._bodies = bodies
        self._space = space
        self._question = question
        self._stored = stored
        self._room = room
        self._body = SiteBody(stored.body)
        self._new: NewBody | None = None

    async def begin(self) -> bool:
        """False: there is no room for it."""
        try:
            await uncancelled(self._begin())
        except BaseException:
            await self._drop()
            raise
        return self._new is not None

    async def _begin(self) -> None:
        try:
            if await self._space.admit(self._body, self._room):
                self._new = await asyncio.to_thread(self._bodies.begin, self._body)
        except (StoreFailed, OSError) as exc:
            self._tell(exc)
        if self._new is None:
            await self._space.settle(self._body)

    async def __aenter__(self) -> Keeping:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._drop()

    async def write(self, data: bytes) -> None:
        if self._new is None:
            return
        if self._new.size + len(data) > self._room:
            trace.note("not stored: longer than what is kept of a body that did not say its length")
            await self._drop()
            return
        try:
            await uncancelled(asyncio.to_thread(self._new.write, data))
            self._space.wrote(self._body, len(data))
        except StoreFailed as exc:
            self._tell(exc)
            await self._drop()

    async def keep(self) -> bool:
        """False: it is not stored, which harms nobody."""
        new = self._new
        if new is None:
            return False
        try:
            await uncancelled(asyncio.to_thread(new.keep))
            self._new = None
            await uncancelled(self._space.settle(self._body))
            await self._cache.put(self._question, replace(self._stored, size=new.size))
        except StoreFailed as exc:
            self._tell(exc)
            return False
        return True

    async def _drop(self) -> None:
        if (new := self._new) is not None:
            self._new = None
            await uncancelled(asyncio.to_thread(new.drop))
            await uncancelled(self._space.settle(self._body))

    def _tell(self, exc: Exception) -> None:
        log.warning("an answer of the site %s is not kept: %s", self._question.site.name, exc)
