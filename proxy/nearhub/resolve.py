"""Resolver: Target → FileMetadata. Owner of what is known of refs and files; asks upstream when freshness says so.

What a path is at a commit never changes (P11): it is recorded once, and a later different answer is an alarm, not an update.
Only ref → commit ages.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from nearhub.errors import HubRefusal, NearhubError, UpstreamError, UpstreamLied
from nearhub.metrics import Metrics
from nearhub.store.index import Index
from nearhub.upstream.dispatch import Dispatcher
from nearhub.wire.freshness import Decision, decide
from nearhub.wire.headers import BlobId, FileMetadata
from nearhub.wire.target import FileTarget, Repo

log = logging.getLogger(__name__)
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

REFUSED_TTL_S = 10.0
"""How long a no of the Hub is repeated without asking again (reliability B20)."""


class Bounded(Generic[K, V]):
    """A dict of the `limit` most recently used items."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        if key not in self._items:
            return None
        self._items.move_to_end(key)
        return self._items[key]

    def put(self, key: K, value: V) -> None:
        self._items[key] = value
        self._items.move_to_end(key)
        if len(self._items) > self._limit:
            self._items.popitem(last=False)

    def drop(self, key: K) -> None:
        self._items.pop(key, None)

    def __len__(self) -> int:
        return len(self._items)


@dataclass(frozen=True, slots=True)
class Ref:
    """What a movable revision was at wall-clock second `asked_at`."""

    commit: str
    asked_at: float


@dataclass(frozen=True, slots=True)
class Resolved:
    meta: FileMetadata
    is_stale: bool = False
    """Upstream did not answer, and this is what it said last."""


class Resolver:
    """`ref_ttl_s`: for how long ref → commit is believed without asking."""

    def __init__(
        self,
        index: Index,
        dispatcher: Dispatcher,
        metrics: Metrics,
        *,
        ref_ttl_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._index = index
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._ref_ttl_s = ref_ttl_s
        self._clock = clock
        self._refs: Bounded[tuple[Repo, str], Ref] = Bounded(10_000)
        self._files: Bounded[FileTarget, FileMetadata] = Bounded(100_000)
        self._refused: Bounded[FileTarget, tuple[HubRefusal, float]] = Bounded(10_000)
        self._asking: dict[FileTarget, asyncio.Task[FileMetadata]] = {}

    async def resolve(self, target: FileTarget, client: str) -> Resolved:
        """What `target` is now. Raises HubRefusal or UpstreamError."""
        ref = None if target.is_pinned else await self._ref(target)
        commit = target.revision if target.is_pinned else ref.commit if ref else None
        known = await self._known(target.at(commit)) if commit else None
        age_s = 0.0 if known and target.is_pinned else self._clock() - ref.asked_at if ref else None
        match decide(age_s=age_s, ttl_s=self._ref_ttl_s, immutable=target.is_pinned):
            case Decision.USE:
                assert commit is not None
                return Resolved(known or await self.ask(target.at(commit), client))
            case Decision.FETCH:
                return Resolved(await self.ask(target, client))
            case _:
                return await self._revalidate(target, known, client)

    async def _revalidate(self, target: FileTarget, known: FileMetadata | None, client: str) -> Resolved:
        try:
            return Resolved(await self.ask(target, client))
        except UpstreamError as exc:
            if known is None:
                raise
            log.info("%s: answered stale: %s", target, exc)
            return Resolved(known, is_stale=True)

    async def ask(self, target: FileTarget, client: str) -> FileMetadata:
        """Ask upstream, anonymously; many at once who ask the same share one request. What is learnt is recorded."""
        refused = self._refused.get(target)
        if refused is not None and 0 <= self._clock() - refused[1] < REFUSED_TTL_S:
            raise refused[0]
        task = self._asking.get(target)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._ask(target, client), name=f"ask {target}")
            self._asking[target] = task
            task.add_done_callback(lambda done: self._asked(target, done))
        return await asyncio.shield(task)

    async def _ask(self, target: FileTarget, client: str) -> FileMetadata:
        try:
            meta = await self._dispatcher.metadata(target, client)
        except HubRefusal as exc:
            self._refused.put(target, (exc, self._clock()))
            raise
        if target.is_pinned and meta.commit != target.revision:
            raise UpstreamLied(f"upstream answered with commit {meta.commit} for {target}")
        meta = await self._record(target, meta)
        if not target.is_pinned:
            await self._move_ref(target, meta.commit)
        return meta

    def _asked(self, target: FileTarget, task: asyncio.Task[FileMetadata]) -> None:
        self._asking.pop(target, None)
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, NearhubError):
            log.error("asking for %s broke", target, exc_info=error)

    async def _record(self, target: FileTarget, meta: FileMetadata) -> FileMetadata:
        """P11. Returns what is recorded, now or earlier."""
        key = target.at(meta.commit)
        row = {"etag": meta.etag, "size": meta.size}
        there = await self._index.run(self._index.add, f"file {key}", row)
        recorded = _metadata(meta.commit, there)
        if recorded != meta:
            self._metrics.alarms.inc()
            log.error("ALARM: upstream now says %s is %s of %d bytes; it was %s", key, meta.blob, meta.size, recorded.blob)
        self._files.put(key, recorded)
        return recorded

    async def _known(self, target: FileTarget) -> FileMetadata | None:
        meta = self._files.get(target)
        if meta is None and (row := await self._index.run(self._index.get, f"file {target}")) is not None:
            meta = _metadata(target.revision, row)
            self._files.put(target, meta)
        return meta

    async def _ref(self, target: FileTarget) -> Ref | None:
        key = (target.repo, target.revision)
        ref = self._refs.get(key)
        if ref is None and (row := await self._index.run(self._index.get, _ref_key(target))) is not None:
            ref = Ref(str(row["commit"]), float(row["asked_at"]))
            self._refs.put(key, ref)
        return ref

    async def _move_ref(self, target: FileTarget, commit: str) -> None:
        ref = Ref(commit, self._clock())
        self._refs.put((target.repo, target.revision), ref)
        await self._index.run(self._index.put, _ref_key(target), {"commit": ref.commit, "asked_at": ref.asked_at})

    async def close(self) -> None:
        """End the questions under way."""
        tasks = list(self._asking.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _ref_key(target: FileTarget) -> str:
    return f"ref {target.repo}@{target.revision}"


def _metadata(commit: str, row: dict[str, Any]) -> FileMetadata:
    return FileMetadata(commit, BlobId.from_etag(row["etag"]), int(row["size"]))
