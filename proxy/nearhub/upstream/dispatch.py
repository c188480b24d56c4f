"""Dispatcher: which upstream is asked next, and how many requests may be under way. Owner of the upstreams' health.

The first upstream is trusted: it alone says what a file is. The others carry bytes, which are verified against that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from nearhub.bounded import Bounded
from nearhub.connectivity import Connectivity
from nearhub.errors import HubRefusal, UpstreamBusy, UpstreamError, UpstreamFailed, UpstreamUnreachable
from nearhub.planner import Lane
from nearhub.upstream.client import METADATA_TIMEOUT_S, Document, LocationExpired, Personal, Upstream
from nearhub.wire.headers import FileMetadata
from nearhub.wire.lfs import Offer, Wanted
from nearhub.wire.target import FileTarget, Repo

OPEN_AFTER = 3
"""Failures in a row after which an upstream is left alone for a while, so that stale answers do not wait for it."""
OPEN_S = 5.0
PROBE_EVERY_S = 3.0
"""How often an upstream that is left alone is asked whether it is back, so that no client's request has to find out."""
ABSORB_S = 5.0
"""How long a question bears with an upstream's short troubles: clients do not repeat all of theirs."""
ABSORBED_FAILURES = 2
_FIRST_PAUSE_S = 0.25

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(slots=True)
class Health:
    """Measured, per upstream. Times are monotonic seconds."""

    failures: int = 0
    closed_until: float = 0.0
    busy: UpstreamBusy | None = None
    """Why it is closed, when it said so itself."""


def rank(healths: Sequence[Health], now: float) -> list[int]:
    """Indices of the upstreams to try, best first: those not closed, fewest failures first, then as configured."""
    usable = [i for i, health in enumerate(healths) if health.closed_until <= now]
    return sorted(usable, key=lambda i: (healths[i].failures >= OPEN_AFTER, healths[i].failures, i))


@dataclass(slots=True)
class Ticket:
    """A place under a limit, asked for by `client` for `holder`."""

    client: str
    holder: object
    ready: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


def choose(waiting: Sequence[Ticket], by_client: Counter[str], by_holder: Counter[object], client_limit: int) -> int | None:
    """Index of the ticket to admit next: the client with fewest, then the blob with fewest, then first come."""
    allowed = [i for i, ticket in enumerate(waiting) if by_client[ticket.client] < client_limit]
    return min(allowed, key=lambda i: (by_client[waiting[i].client], by_holder[waiting[i].holder], i), default=None)


class Slots:
    """At most `limit` at a time, shared fairly between client addresses and then blobs."""

    def __init__(self, limit: int, client_limit: int) -> None:
        self.limit = limit
        self._client_limit = client_limit
        self._active = 0
        self._by_client: Counter[str] = Counter()
        self._by_holder: Counter[object] = Counter()
        self._waiting: list[Ticket] = []

    def __repr__(self) -> str:
        return f"<Slots {self._active}/{self.limit}, {len(self._waiting)} waiting>"

    @asynccontextmanager
    async def hold(self, client: str, holder: object) -> AsyncIterator[None]:
        """Wait for a place and keep it for the body. Cancelled while waiting: the place is not taken."""
        ticket = Ticket(client, holder)
        self._waiting.append(ticket)
        self._admit()
        try:
            await ticket.ready
        except asyncio.CancelledError:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            elif not ticket.ready.cancelled():
                self._leave(ticket)
            raise
        try:
            yield
        finally:
            self._leave(ticket)

    def _admit(self) -> None:
        # A cancelled ticket waits for its task to run once more; admitted meanwhile, it would raise in somebody else's task.
        self._waiting = [ticket for ticket in self._waiting if not ticket.ready.cancelled()]
        while self._active < self.limit:
            index = choose(self._waiting, self._by_client, self._by_holder, self._client_limit)
            if index is None:
                return
            ticket = self._waiting.pop(index)
            self._active += 1
            self._by_client[ticket.client] += 1
            self._by_holder[ticket.holder] += 1
            ticket.ready.set_result(None)

    def _leave(self, ticket: Ticket) -> None:
        self._active -= 1
        for counter, key in ((self._by_client, ticket.client), (self._by_holder, ticket.holder)):
            counter[key] -= 1  # type: ignore[index]
            if not counter[key]:  # type: ignore[index]
                del counter[key]
        self._admit()


class Dispatcher:
    """Tries upstreams in order of health and remembers how they did."""

    def __init__(
        self,
        upstreams: Sequence[Upstream],
        *,
        connections: int,
        client_connections: int,
        absorb_s: float = ABSORB_S,
        connectivity: Connectivity | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.upstreams = tuple(upstreams)
        self.connectivity = connectivity or Connectivity()
        self._absorb_s = absorb_s
        self._probes: dict[Upstream, asyncio.Task[None]] = {}
        # Apart: a CDN that asks for a pause says nothing about the Hub's answers to questions, nor the other way round.
        self._content = tuple(Health() for _ in upstreams)
        self._metadata = tuple(Health() for _ in upstreams)
        self._pauses: Bounded[Hashable, tuple[float, UpstreamBusy]] = Bounded(10_000)
        self._clock = clock
        self._sleep = sleep
        express, metadata = max(1, connections // 8), max(1, connections // 4)
        bulk = max(1, connections - express - metadata)
        prefetch = max(1, bulk // 4)
        self._slots = {
            Lane.BULK: Slots(bulk, client_connections),
            Lane.PREFETCH: Slots(prefetch, prefetch),
            Lane.EXPRESS: Slots(express, connections),
            Lane.METADATA: Slots(metadata, connections),
        }

    def __repr__(self) -> str:
        return f"<Dispatcher {self._slots}>"

    def slots(self, lane: Lane) -> Slots:
        return self._slots[lane]

    @asynccontextmanager
    async def place(self, lane: Lane, client: str, holder: object) -> AsyncIterator[None]:
        """A place in `lane`, as its slots' hold(). One for a prefetch is one of the bulk lane too, but of a quarter at most."""
        async with contextlib.AsyncExitStack() as stack:
            for one in (lane,) if lane is not Lane.PREFETCH else (lane, Lane.BULK):
                await stack.enter_async_context(self._slots[one].hold(client, holder))
            yield

    async def metadata(self, target: FileTarget, client: str) -> FileMetadata:
        """What the trusted upstreams say of `target`. A refusal by the Hub is an answer, and ends the search."""
        return await self.ask(lambda upstream: upstream.metadata(target), client, target, about=target.repo)

    async def document(
        self, path: str, client: str, form: Mapping[str, Any] | None = None, *, about: Repo | None = None
    ) -> Document:
        """A trusted upstream's JSON for `path`, raw and with its query; see Upstream.document."""
        return await self.ask(lambda upstream: upstream.document(path, form, about=about), client, path, about=about)

    async def lfs_offers(self, repo: Repo, objects: Iterable[Wanted], client: str) -> dict[str, Offer]:
        """What a trusted upstream's LFS batch for `repo` says of these objects, by oid."""
        asked = tuple(objects)
        return await self.ask(lambda upstream: upstream.lfs_offers(repo, asked), client, repo, about=repo)

    async def personal(self, path: str, client: str, authorization: str | None) -> Personal:
        """The first upstream's answer to one caller's own token."""
        self.connectivity.require()
        async with self.slots(Lane.METADATA).hold(client, path):
            return await self.upstreams[0].personal(path, authorization)

    async def permits(self, repo: Repo, authorization: str, client: str) -> None:
        """Return if the Hub lets this token have the content of `repo`, which is restricted."""
        await self.ask(lambda upstream: upstream.permits(repo, authorization), client, repo, about=repo, token=authorization)

    async def ask(
        self,
        ask: Callable[[Upstream], Awaitable[T]],
        client: str,
        holder: object,
        *,
        about: Repo | None = None,
        token: Hashable = None,
    ) -> T:
        """What the first trusted upstream that has an answer says. A refusal by the Hub is one.

        `token`: whose limits the question counts against; about a restricted repo, those of the token that it is asked with.

        Short troubles are borne here: a client's library gives up on one 429 or 503 of many questions (measured)."""
        self.connectivity.require()
        if token is None and about is not None and about.is_restricted:
            token = about
        give_up_at = self._clock() + self._absorb_s
        failures = 0
        while True:
            try:
                async with self.slots(Lane.METADATA).hold(client, holder):
                    return await self._first_answer(ask, about, token)
            except UpstreamBusy as exc:
                wait_s = max(exc.retry_after_s, _FIRST_PAUSE_S)  # `Retry-After: 0` is no leave to ask without end
                if self._clock() + wait_s > give_up_at:
                    raise
            except UpstreamFailed:
                wait_s = _FIRST_PAUSE_S * 2**failures
                failures += 1
                if failures > ABSORBED_FAILURES or self._clock() + wait_s > give_up_at:
                    raise
            await self._sleep(wait_s)

    async def _first_answer(self, ask: Callable[[Upstream], Awaitable[T]], about: Repo | None, token: Hashable) -> T:
        last: UpstreamError | None = None
        if (pause := self._pauses.get(token)) is not None and (left_s := pause[0] - self._clock()) > 0:
            raise UpstreamBusy(pause[1].message, retry_after_s=left_s, status=pause[1].http_status)
        for upstream in self.candidates(trusted_only=True, about=about):
            try:
                answer = await ask(upstream)
            except HubRefusal:
                self.succeeded(upstream, metadata=True)
                raise
            except UpstreamBusy as exc:
                if token is None:
                    self.failed(upstream, exc, metadata=True)
                else:  # who has asked too much with his token keeps nobody else waiting
                    self._pauses.put(token, (self._clock() + exc.retry_after_s, exc))
                last = exc
            except UpstreamError as exc:
                self.failed(upstream, exc, metadata=True)
                last = exc
            else:
                self.succeeded(upstream, metadata=True)
                return answer
        raise last or self.why_none(metadata=True, about=about)

    def _watch(self, upstream: Upstream) -> None:
        """Ask until it answers again, in the background."""
        if upstream not in self._probes:
            task = asyncio.get_running_loop().create_task(self._probe(upstream), name=f"probe {upstream}")
            self._probes[upstream] = task
            task.add_done_callback(lambda _: self._probes.pop(upstream, None))
        if all(one in self._probes for one in self.upstreams if one.trusted):
            self.connectivity.lost()

    async def _probe(self, upstream: Upstream) -> None:
        log.warning("%s does not answer: what is known is served stale", upstream)
        health = self._of(upstream, metadata=True)
        while True:
            # Closed until this probe has its answer, also where it has to wait for one as long as a question may.
            patience_s = PROBE_EVERY_S + METADATA_TIMEOUT_S + OPEN_S
            health.closed_until = max(health.closed_until, self._clock() + patience_s)
            await self._sleep(PROBE_EVERY_S)
            try:
                await upstream.probe()
            except UpstreamUnreachable:
                continue
            except UpstreamError:
                break
            else:
                break
        log.warning("%s answers again", upstream)
        self.connectivity.found()
        self.succeeded(upstream, metadata=True)

    async def close(self) -> None:
        tasks = list(self._probes.values())
        for task in tasks:
            task.cancel()
        with contextlib.suppress(ValueError):
            await asyncio.wait(tasks)

    def candidates(self, *, trusted_only: bool = False, about: Repo | None = None) -> list[Upstream]:
        """Upstreams that may be asked now, best first; empty when all are resting. `trusted_only`: for metadata.

        About a restricted repo only the first is asked: it is the one that callers' tokens are for. None is asked for somebody
        who may have only what is here.
        """
        if self.connectivity.is_closed or (about is not None and not about.may_ask):
            return []
        health = self._metadata if trusted_only else self._content
        order = (self.upstreams[i] for i in rank(health, self._clock()))
        if self.connectivity.is_offline:  # whoever is probed has not answered for long: no fill has to find that out again
            order = (upstream for upstream in order if upstream not in self._probes)
        if about is not None and about.is_restricted:
            return [upstream for upstream in order if upstream is self.upstreams[0]]
        return [upstream for upstream in order if upstream.trusted or not trusted_only]

    def may_ask(self, about: Repo | None = None) -> bool:
        """Whether there is any use in a question: not while offline, nor for who may have only what is here."""
        return not self.connectivity.is_offline and (about is None or about.may_ask)

    def why_none(self, *, metadata: bool = False, about: Repo | None = None) -> UpstreamError:
        """The error for a request that finds no upstream to ask."""
        if about is not None and not about.may_ask:
            return UpstreamUnreachable(f"of {about} this caller may have what is here, and upstream is not asked for more")
        if self.connectivity.is_offline:
            return self.connectivity.error()
        now = self._clock()
        healths = self._metadata if metadata else self._content
        soonest = min((health.closed_until for health in healths), default=now)
        wait_s = max(1.0, soonest - now)
        busy = next((health.busy for health in healths if health.busy), None)
        if busy is not None:
            return UpstreamBusy(busy.message, retry_after_s=wait_s, status=busy.http_status)
        return UpstreamUnreachable(f"no upstream answers; the next try is in {wait_s:.0f} s")

    def report(self) -> list[dict[str, str]]:
        """Each upstream, and how it is, in words: for operators."""
        now = self._clock()

        def state(health: Health) -> str:
            if self.connectivity.is_closed:
                return "not asked: this mirror is offline"
            if health.closed_until <= now:
                return f"{health.failures} failures in a row" if health.failures else "asked when needed"
            why = "asks for a pause" if health.busy else "does not answer"
            return f"{why}: left alone for {health.closed_until - now:.0f} s"

        return [
            {"url": upstream.url, "state": f"metadata: {state(metadata)}; content: {state(content)}"}
            for upstream, metadata, content in zip(self.upstreams, self._metadata, self._content, strict=True)
        ]

    def succeeded(self, upstream: Upstream, *, metadata: bool = False) -> None:
        health = self._of(upstream, metadata)
        health.failures = 0
        if health.busy is None:
            health.closed_until = 0.0
        elif health.closed_until <= self._clock():
            health.busy = None  # not sooner: answers to earlier requests do not lift the pause it asked for

    def failed(self, upstream: Upstream, error: UpstreamError, *, metadata: bool = False) -> None:
        health = self._of(upstream, metadata)
        health.failures += 1
        now = self._clock()
        if isinstance(error, UpstreamBusy):
            health.busy = error
            health.closed_until = max(health.closed_until, now + error.retry_after_s)
        elif isinstance(error, UpstreamUnreachable) and (health.failures >= OPEN_AFTER or error.is_silence):
            health.busy = None
            health.closed_until = now + OPEN_S
            if metadata:
                self._watch(upstream)

    def judge(self, exc: UpstreamError | HubRefusal, upstream: Upstream | None) -> UpstreamError:
        """What a request for content that failed means, noted against its upstream, but for a signed URL that had its time.

        A trusted upstream's refusal is final: it is raised.
        """
        if isinstance(exc, HubRefusal):
            if upstream is None or upstream.trusted:
                raise exc
            exc = UpstreamFailed(f"{upstream.url} does not have it: {exc.message}")
        if upstream is not None and not isinstance(exc, LocationExpired):
            self.failed(upstream, exc)
        return exc

    def _of(self, upstream: Upstream, metadata: bool) -> Health:
        return (self._metadata if metadata else self._content)[self.upstreams.index(upstream)]
