"""GitMirrors: owner of the bare mirrors. Brings a repo's git objects and refs by `git fetch`, once for all, and lends them.

A look (`git ls-remote`) tells whether anything changed; only then is fetched. Both are shared, and go on when whoever asked
leaves. What is known is used as refs are: for its TTL, as long again while upstream is asked, then after a look, or stale
when upstream does not answer that. A fetch under way is waited for: its news are what the client came for.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

from nearhub import trace
from nearhub.bounded import Bounded
from nearhub.errors import (
    GitFailed,
    GitUnfit,
    HubRefusal,
    NearhubError,
    StoreError,
    StoreFull,
    UnknownOffline,
    UpstreamError,
    UpstreamFailed,
    UpstreamUnreachable,
)
from nearhub.git.processes import Done, run
from nearhub.metrics import Metrics
from nearhub.planner import Lane
from nearhub.single_flight import SingleFlight
from nearhub.store.bares import BareId, BareStore, Said
from nearhub.store.eviction import Space
from nearhub.tasks import uncancelled
from nearhub.upstream.client import METADATA_TIMEOUT_S, ProxyFor
from nearhub.upstream.dispatch import Dispatcher
from nearhub.upstream.keys import Keyring
from nearhub.wire import git as words
from nearhub.wire.freshness import Decision, decide
from nearhub.wire.git import Refs
from nearhub.wire.target import Repo, RepoKind

log = logging.getLogger(__name__)

LOCAL_TIMEOUT_S = 60.0
"""Of what git does here without asking anybody."""
TIDY_TIMEOUT_S = 3600.0
LOOK_MEMORY = 512 * 1024**2
FETCH_MEMORY = 2 * 1024**3
"""What a git may take to read what upstream says: an object, or refs, that unpack without end end there."""
REFUSED_TTL_S = 600.0
"""How long something too large or malformed is not fetched again, unless it changes."""
RETRY_PAUSE_S = 0.25
"""A fetch that was cut is begun once more after this, before all who wait for it hear of it."""
MAX_PACKS = 16
"""Fetches that are packed into one afterwards."""
WATCH_S = 1.0
WAIT_S = 0.2
"""How often is looked whether a git that outlived an earlier process is gone."""
HEADROOM = 16 * 1024**2
"""Room that a fetch is promised ahead of what it has."""


@dataclass(frozen=True, slots=True)
class Bare:
    """A bare mirror, lent. `is_stale`: upstream could not be asked."""

    path: Path
    is_stale: bool


@dataclass(frozen=True, slots=True)
class Refusal:
    """What upstream has at these refs was brought once, in vain."""

    at: float
    refs: str
    error: GitUnfit


class GitMirrors:
    """`named`: URLs of other hosts' repos, by the name they have here."""

    def __init__(
        self,
        store: BareStore,
        space: Space,
        dispatcher: Dispatcher,
        metrics: Metrics,
        keys: Keyring,
        *,
        named: Mapping[str, str],
        proxy_for: ProxyFor,
        ca_bundle: str | None,
        ref_ttl_s: float,
        max_bytes: int,
        fetch_timeout_s: float,
        keeps_open: Callable[[Repo], bool] = lambda repo: False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._space = space
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._keys = keys
        self._named = dict(named)
        self._proxy_for = proxy_for
        self._ca_bundle = ca_bundle
        self._ref_ttl_s = ref_ttl_s
        self._max_bytes = max_bytes
        self._fetch_timeout_s = fetch_timeout_s
        self._keeps_open = keeps_open
        self._clock = clock
        self._flights = SingleFlight(clock)
        self._refused: Bounded[BareId, Refusal] = Bounded(1000)
        self._writers: WeakValueDictionary[BareId, asyncio.Lock] = WeakValueDictionary()

    def named_url(self, repo: Repo) -> str | None:
        """Where it is, if `repo` stands for a repo of another host, by the operator's word."""
        return self._named.get(repo.name) if repo.kind is RepoKind.MODELS else None

    def bare_of(self, repo: Repo) -> BareId:
        return BareId.of(repo) if self.named_url(repo) is None else BareId.named(repo.name)

    @asynccontextmanager
    async def lend(self, repo: Repo, client: str, *, must_be_fresh: bool) -> AsyncIterator[Bare]:
        """The bare mirror of `repo`, which stays while the context lasts.

        `must_be_fresh` False: what is here is good enough, since an answer that began with it goes on. Raises HubRefusal when
        upstream has no such repo, UpstreamError when nothing is here and upstream does not answer, or StoreError.
        """
        bare = self.bare_of(repo)
        with self._store.hold(bare) as path:
            is_stale = await self._freshen(repo, bare, client, must_be_fresh=must_be_fresh)
            await asyncio.to_thread(self._store.note_use, bare)
            self._space.touched(bare)
            yield Bare(path, is_stale)

    async def _freshen(self, repo: Repo, bare: BareId, client: str, *, must_be_fresh: bool) -> bool:
        """Bring what upstream has, if need be; whether what is here now is stale."""
        said = await asyncio.to_thread(self._store.said, bare)
        age_s = None if said is None else self._clock() - said.at
        immutable = said is not None and not must_be_fresh
        ttl_s = self._ref_ttl_s
        may_ask = self._dispatcher.may_ask(repo)
        decision = decide(age_s=age_s, ttl_s=ttl_s, grace_s=ttl_s, immutable=immutable, reachable=may_ask)
        if age_s is not None:
            trace.note(f"{bare}: upstream was asked {age_s:.0f} s ago: {decision.value}")
        if decision is Decision.USE_AND_REFRESH:
            self._flights.start(bare, lambda: self._bring(repo, bare, client))
        elif decision is Decision.FETCH:
            try:
                await self._flights.share(bare, lambda: self._bring(repo, bare, client))
            except UpstreamUnreachable as exc:
                raise UnknownOffline(f"{bare} is not in this mirror, and upstream cannot be asked: {exc.message}") from exc
        elif decision is Decision.REVALIDATE:
            return not await self._revalidated(repo, bare, client)
        elif decision is Decision.FAIL:
            raise UnknownOffline(f"{bare} is not in this mirror: {self._dispatcher.why_none(about=repo).message}")
        return decision is Decision.USE_STALE

    async def _revalidated(self, repo: Repo, bare: BareId, client: str) -> bool:
        """Whether upstream was heard, and what it said is here."""
        try:
            look = await self._flights.share_or_none(("look", bare), lambda: self._look(repo, bare, client))
        except HubRefusal:
            if not self._keeps_open(repo):
                raise
            look = None
        if look is None:
            return False
        try:
            await self._flights.share(bare, lambda: self._take(repo, bare, *look, client))
        except (UpstreamError, StoreError) as exc:
            trace.note(f"answered stale: {exc.message}")
            return False
        return True

    # — asking upstream ————————————————————————————————————————————————————————————————————————————

    async def _bring(self, repo: Repo, bare: BareId, client: str) -> None:
        url, refs = await self._flights.share(("look", bare), lambda: self._look(repo, bare, client))
        await self._take(repo, bare, url, refs, client)

    async def _take(self, repo: Repo, bare: BareId, url: str, refs: Refs, client: str) -> None:
        """Fetch from `url` if `refs`, which are there, are not what is here."""
        with self._store.hold(bare):
            said = await asyncio.to_thread(self._store.said, bare)
            if said is not None and said.refs == refs.digest:
                await asyncio.to_thread(self._store.note_said, bare, Said(self._clock(), refs.digest))
                self._metrics.git_fetches.labels("unchanged").inc()
                return
            refusal = self._refused.get(bare)
            if refusal is not None and refusal.refs == refs.digest and 0 <= self._clock() - refusal.at < REFUSED_TTL_S:
                raise refusal.error
            try:
                await self._fetch(repo, bare, url, refs, client)
            except NearhubError as exc:
                self._metrics.git_fetches.labels("failed").inc()
                log.warning("%s: %s", bare, exc.message)
                if isinstance(exc, GitUnfit):
                    self._refused.put(bare, Refusal(self._clock(), refs.digest, exc))
                raise
        self._metrics.git_fetches.labels("fetched").inc()
        self._flights.start(("tidy", bare), lambda: self._tidy(bare))

    async def _look(self, repo: Repo, bare: BareId, client: str) -> tuple[str, Refs]:
        """Upstream's refs, and the URL that told them."""
        trace.note(f"upstream is asked for the refs of {bare}")

        async def look(url: str) -> tuple[str, Refs]:
            self._dispatcher.connectivity.require()
            self._metrics.upstream_contacts.labels("git").inc()
            try:
                done = await run(
                    [*words.LOOK, url],
                    self._fetching(url, repo),
                    timeout_s=METADATA_TIMEOUT_S,
                    most=words.MAX_REFS_BYTES,
                    memory=LOOK_MEMORY,
                )
            except TimeoutError:
                raise UpstreamUnreachable(f"{url} took longer than {METADATA_TIMEOUT_S:g} s") from None
            if done.status != 0:
                raise words.explain(done.complaint, url)
            return url, words.read_refs(done.output, url)

        if (url := self.named_url(repo)) is not None:
            async with self._dispatcher.slots(Lane.METADATA).hold(client, bare):
                return await look(url)
        return await self._dispatcher.ask(lambda upstream: look(words.url_of(upstream.url, repo)), client, bare, about=repo)

    def _fetching(self, url: str, repo: Repo) -> dict[str, str]:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        proxy = self._proxy_for(parts.scheme, parts.hostname or "", port)
        authorization = self._keys.headers(repo).get("Authorization")
        return words.fetching(url, proxy=proxy, ca_bundle=self._ca_bundle, authorization=authorization)

    async def _fetch(self, repo: Repo, bare: BareId, url: str, refs: Refs, client: str) -> None:
        """Raises UpstreamError, StoreFull, GitFailed. What was there before stays whole whatever happens."""
        started = time.monotonic()
        wanted = words.ALL_REFS if self.named_url(repo) is None else words.BRANCHES_AND_TAGS
        try:
            began = (await asyncio.to_thread(self._store.held, bare)).bytes
            if not await self._space.admit(bare, began + HEADROOM):
                raise StoreFull(f"no room for the {bare}")
            async with self._dispatcher.slots(Lane.BULK).hold(client, bare), self._writing(bare) as lock:
                directory = str(self._store.path_of(bare))
                await self._local([*words.INIT, directory], None, lock)
                if (said := await asyncio.to_thread(self._store.said, bare)) is not None:
                    # Which refs are here is not known until the end: git drops those that are gone before it has the new ones.
                    await asyncio.to_thread(self._store.note_said, bare, replace(said, refs=""))
                for is_last in (False, True):
                    try:
                        await self._fetch_into(directory, repo, bare, [url, *wanted], lock, began)
                        break
                    except BaseException as exc:
                        await uncancelled(asyncio.to_thread(self._store.sweep, bare))
                        if is_last or not _is_short_trouble(exc):
                            raise
                        log.info("%s: %s; once more", bare, exc)
                    await asyncio.sleep(RETRY_PAUSE_S)
                await self._local(list(words.PACK_REFS), directory, lock, timeout_s=TIDY_TIMEOUT_S)
                if refs.head is not None:
                    await self._local(["symbolic-ref", "HEAD", refs.head], directory, lock)
                await asyncio.to_thread(self._store.note_said, bare, Said(self._clock(), refs.digest))
        finally:
            await self._space.settle(bare)
        log.info("%s: fetched %d refs in %.1f s", bare, refs.count, time.monotonic() - started)

    async def _fetch_into(self, directory: str, repo: Repo, bare: BareId, what: Sequence[str], lock: int, began: int) -> None:
        url = what[0]
        self._dispatcher.connectivity.require()
        self._metrics.upstream_contacts.labels("git").inc()
        fetch = asyncio.ensure_future(
            run(
                [*words.FETCH, *what],
                self._fetching(url, repo),
                timeout_s=self._fetch_timeout_s,
                directory=directory,
                keeps=lock,
                largest_file=self._max_bytes,
                memory=FETCH_MEMORY,
            )
        )
        watch = asyncio.ensure_future(self._watch(bare, began))
        try:
            await asyncio.wait([fetch, watch], return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                raise watch.exception() or GitFailed(f"{bare}: its size is not known")
            done = await fetch
        except TimeoutError:
            raise GitUnfit(f"{url} took longer than {self._fetch_timeout_s:.0f} s to fetch from") from None
        finally:
            for task in (fetch, watch):
                task.cancel()
            await asyncio.wait([fetch, watch])
        if done.status != 0:
            if await asyncio.to_thread(self._store.largest_file, bare) >= self._max_bytes:
                raise self._too_large(bare)
            raise words.explain(done.complaint, url)

    async def _watch(self, bare: BareId, began: int) -> None:
        """Raises once it has become larger than it may, or than there is room. `began`: bytes that were there before."""
        promised = began + HEADROOM
        while True:
            await asyncio.sleep(WATCH_S)
            there = (await asyncio.to_thread(self._store.held, bare)).bytes
            if there > self._max_bytes:
                raise self._too_large(bare)
            if there > promised - HEADROOM // 2:
                # As much again, so that large ones are seldom asked about; near the limit, what is needed for now.
                for promised in (there + max(HEADROOM, there - began), there + HEADROOM):
                    if await self._space.admit(bare, promised):
                        break
                else:
                    raise StoreFull(f"no room for the {bare}, which has more than {there} bytes")

    def _too_large(self, bare: BareId) -> GitUnfit:
        return GitUnfit(f"the {bare} has more than {self._max_bytes} bytes: [git] max_repo_size allows no more")

    @asynccontextmanager
    async def _writing(self, bare: BareId) -> AsyncIterator[int]:
        async with self._writers.setdefault(bare, asyncio.Lock()):
            while (lock := self._store.lock(bare)) is None:  # noqa: ASYNC110 - a process that is not ours sets no event
                await asyncio.sleep(WAIT_S)
            try:
                yield lock
            finally:
                os.close(lock)

    async def _tidy(self, bare: BareId) -> None:
        with self._store.hold(bare) as path:
            if len(list(path.glob("objects/pack/*.pack"))) <= MAX_PACKS:
                return
            async with self._writing(bare) as lock:
                done = await run(words.TIDY, words.serving(), timeout_s=TIDY_TIMEOUT_S, directory=str(path), keeps=lock)
            if done.status != 0:
                log.warning("%s could not be packed: %s", bare, done.complaint.strip()[:300])

    async def _local(
        self, arguments: list[str], directory: str | None, lock: int, *, timeout_s: float = LOCAL_TIMEOUT_S
    ) -> Done:
        try:
            done = await run(arguments, words.serving(), timeout_s=timeout_s, directory=directory, keeps=lock)
        except TimeoutError:
            raise GitFailed(f"git {arguments[0]} took longer than {timeout_s:.0f} s here") from None
        if done.status != 0:
            raise GitFailed(f"git {arguments[0]} failed here: {done.complaint.strip()[:300]}")
        return done

    async def close(self) -> None:
        """End the fetches under way."""
        await self._flights.close()


def _is_short_trouble(exc: BaseException) -> bool:
    """Whether a fetch that failed so may succeed at once: upstream answered a moment ago, or it would not have begun."""
    return isinstance(exc, UpstreamFailed | UpstreamUnreachable) and not isinstance(exc, GitUnfit)
