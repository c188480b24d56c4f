"""Documents: what upstream says in its own words (listings, refs, commits, discussions …), kept for a while. Their owner.

Asked with nobody's token, so that what is kept may be shown to everybody; but of a restricted repo with that of somebody who
may see it, and kept apart for those.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nearhub import trace
from nearhub.errors import HubRefusal, UnknownOffline, UpstreamUnreachable
from nearhub.single_flight import SingleFlight
from nearhub.store.index import Index
from nearhub.upstream.dispatch import Dispatcher
from nearhub.wire.freshness import Decision, decide
from nearhub.wire.target import Repo, Scope

MAX_KEPT_BYTES = 2 * 1024**2
MAX_KEPT = 5_000
_PRUNE_EVERY = 64
_PREFIX = "doc "


@dataclass(frozen=True, slots=True)
class Kept:
    """A document in the index. `path`: raw, with its query, and with a digest of what was POSTed, if something was."""

    path: str
    at: float
    value: Any
    next_query: str | None


def kept_about(index: Index, repo: Repo) -> list[Kept]:
    """All that is kept of a repo, in its scope. Blocks."""
    prefix = f"{_PREFIX}{repo.scope} "
    rows = index.scan(f"{prefix}/api/{repo.kind}/{repo.name}/")
    return [Kept(key.removeprefix(prefix), row["at"], row["value"], row["next"]) for key, row in rows]


def keep_about(index: Index, repo: Repo, documents: Iterable[Kept]) -> None:
    """Keep what another mirror was told; what is here and younger stays. Blocks."""
    rows = [
        (f"{_PREFIX}{repo.scope} {kept.path}", {"at": kept.at, "value": kept.value, "next": kept.next_query})
        for kept in documents
        if kept.path.startswith(f"/api/{repo.kind}/{repo.name}/")
    ]
    with index.transaction():
        here = {key: index.get(key) for key, _ in rows}
        index.put_many([(key, row) for key, row in rows if (there := here[key]) is None or there["at"] < row["at"]])


@dataclass(frozen=True, slots=True)
class Page:
    """A document as upstream sent it. `next_query`: of the next page."""

    value: Any
    next_query: str | None
    is_stale: bool = False


class Documents:
    """Clock: wall seconds."""

    def __init__(
        self,
        index: Index,
        dispatcher: Dispatcher,
        clock: Callable[[], float] = time.time,
        keeps_open: Callable[[Repo], bool] = lambda repo: False,
    ) -> None:
        self._index = index
        self._dispatcher = dispatcher
        self._keeps_open = keeps_open
        self._clock = clock
        self._asking = SingleFlight(clock)
        self._puts = 0

    async def get(
        self, path: str, client: str, *, ttl_s: float, about: Repo | None = None, form: Mapping[str, Any] | None = None
    ) -> Page:
        """The document at `path`, raw and with its query. `form`: POSTed as JSON; a question that changes nothing.

        `about`: the repo that it is about, if it is about one.

        Raises HubRefusal, or UpstreamError when upstream does not answer and nothing is kept.
        """
        scope = Scope.PUBLIC if about is None else about.scope
        # What a client writes into a query is kept nowhere: it may be a secret.
        asked, _, query = path.partition("?")
        key = f"{_PREFIX}{scope} {asked}" + (f" {_digest([query, form])}" if query or form is not None else "")
        row = await self._index.run(self._index.get, key)
        age_s = None if row is None else self._clock() - float(row["at"])
        decision = decide(age_s=age_s, ttl_s=ttl_s, grace_s=ttl_s, reachable=self._dispatcher.may_ask(about))
        trace.note(f"document: {'none kept' if age_s is None else f'{age_s:.0f} s old'}: {decision.value}")

        async def ask() -> Page:
            return await self._ask(key, path, client, about, form)

        if row is None:
            try:
                return await self._asking.share(key, ask)
            except UpstreamUnreachable as exc:
                raise UnknownOffline(f"this mirror has no answer to {asked}: {exc.message}") from exc
        kept = Page(row["value"], row["next"], is_stale=decision is Decision.USE_STALE)
        if decision is Decision.USE_AND_REFRESH:
            self._asking.start(key, ask)
        if decision is Decision.USE_STALE:
            return replace(kept, is_stale=True)
        if decision is not Decision.REVALIDATE:
            return kept
        stale = replace(kept, is_stale=True)
        try:
            return await self._asking.share_or_none(key, ask) or stale
        except HubRefusal:
            if about is None or not self._keeps_open(about):
                raise
            return stale

    async def _ask(self, key: str, path: str, client: str, about: Repo | None, form: Mapping[str, Any] | None) -> Page:
        trace.note(f"upstream is asked for {path.partition('?')[0]}")
        document = await self._dispatcher.document(path, client, form, about=about)
        if document.size <= MAX_KEPT_BYTES:
            row = {"at": self._clock(), "value": document.value, "next": document.next_query}
            await self._index.keep(self._index.put, key, row)
            self._puts += 1
            if self._puts % _PRUNE_EVERY == 0:
                await self._index.keep(self._index.prune, _PREFIX, MAX_KEPT)
        return Page(document.value, document.next_query)

    async def close(self) -> None:
        """End the questions under way."""
        await self._asking.close()


def _digest(question: object) -> str:
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
