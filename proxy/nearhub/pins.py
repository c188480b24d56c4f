"""Pins: what the operator keeps, whatever room is needed and whatever upstream does with it. Owner of their rows.

    pin <repo>@<revision>   → group, last, was_public, at; the commits that a branch or tag was seen to name, newest first

A pin of a commit keeps that commit. A pin of a branch or tag keeps the commits that it named since, the newest `last` of them;
and the one before, until all of the newest is here, so that a branch that moves never leaves nothing. A pin without a revision
keeps all that is known of the repo, and its git mirror. Kept means: no blob of it is evicted, and nothing of it is purged but
by force. And a repo that was public when it was pinned stays open, as it was, when upstream closes or deletes it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from nearhub.catalog import Catalog
from nearhub.errors import BadTarget, NearhubError
from nearhub.store.bares import BareId
from nearhub.store.blobs import BlobStore
from nearhub.store.holdings import Holding
from nearhub.store.index import Index
from nearhub.wire.headers import BlobId
from nearhub.wire.target import DEFAULT_REVISION, Repo, Scope, is_commit

log = logging.getLogger(__name__)

_PREFIX = "pin "
_REMEMBERED = 8
"""Commits that a branch named before, beyond those that are kept: should it move back."""
ALL = ""
"""The revision of a pin of a whole repo."""


@dataclass(frozen=True, slots=True)
class Pin:
    """`repo` by its canonical name, of public scope; `last` commits of `revision` are kept. `at`: wall seconds."""

    repo: Repo
    revision: str = ALL
    last: int = 1
    group: str = ""
    was_public: bool = False
    at: float = 0.0
    commits: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else str(self.repo)


def kept(commits: Sequence[str], last: int, *, is_whole: bool) -> tuple[str, ...]:
    """Of the commits that a branch named, newest first, those that its pin keeps. `is_whole`: all of the newest is here."""
    return tuple(commits[: last if is_whole else last + 1])


def moved(commits: Sequence[str], to: str, last: int) -> tuple[str, ...]:
    """What a branch named, newest first, once it names `to`."""
    return (to, *(commit for commit in commits if commit != to))[: last + _REMEMBERED]


class Pins:
    """Clock: wall seconds. `refresh()` after whatever may change what is kept; in a mirror, a task does so."""

    def __init__(self, index: Index, catalog: Catalog, store: BlobStore, clock: Callable[[], float] = time.time) -> None:
        self._index = index
        self._catalog = catalog
        self._store = store
        self._clock = clock
        self._pins: dict[str, Pin] = {}
        self._holdings: frozenset[Holding] = frozenset()
        self._open: frozenset[Repo] = frozenset()
        self._awaited: dict[str, set[BlobId]] = {}
        """Of pins that keep one commit more until the newest is whole: what is missing of that."""
        self._news = asyncio.Event()
        self._refreshing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Pins {len(self._pins)}, of {len(self._holdings)} blobs and git mirrors>"

    # — what they say ————————————————————————————————————————————————————————————————————————————————

    @property
    def all(self) -> list[Pin]:
        return list(self._pins.values())

    def holdings(self) -> Set[Holding]:
        """The blobs and bare mirrors that stay."""
        return self._holdings

    def keeps_open(self, repo: Repo) -> bool:
        """Whether `repo` was pinned while it was public: what was public of it stays so here, whatever upstream says now."""
        return not repo.is_restricted and repo in self._open

    async def commits(self, pin: Pin) -> list[tuple[Repo, str]]:
        """(repo in its scope, commit) of every manifest that `pin` keeps."""
        found = []
        for scope in Scope:
            repo = replace(pin.repo, scope=scope)
            known = [commit for _, commit in await self._catalog.manifests(repo)]
            if pin.revision == ALL:
                chosen: Iterable[str] = known
            elif is_commit(pin.revision):
                chosen = (pin.revision,)
            else:
                missing = await self._missing(repo, pin.commits[0]) if pin.commits[pin.last :] else set()
                chosen = kept(pin.commits, pin.last, is_whole=not missing)
            found += [(repo, commit) for commit in chosen if commit in known]
        return found

    async def _missing(self, repo: Repo, commit: str) -> set[BlobId]:
        """What of it is not here."""
        blobs = await self._blobs(repo, commit)
        return await asyncio.to_thread(lambda: {blob for blob in blobs if not self._store.path_of(blob).exists()})

    async def _blobs(self, repo: Repo, commit: str) -> list[BlobId]:
        listing = await self._catalog.listing(repo, commit, recursive=True)
        return [entry.blob for entry in listing if entry.blob is not None]

    # — what is done ————————————————————————————————————————————————————————————————————————————————

    async def pin(self, repo: Repo, revision: str = ALL, *, last: int = 1, group: str = "") -> Pin:
        """Keep it from now on. Raises BadTarget where nothing is known here of what it names."""
        repo = await self._named(repo)
        if last > 1 and revision == ALL:
            revision = DEFAULT_REVISION
        if last > 1 and is_commit(revision):
            raise BadTarget("a commit has no last ones: pin a branch, or leave --last out")
        seen = await self._catalog.seen(repo)
        was_public = seen is not None and not seen.visibility.is_gated and not seen.visibility.is_disabled
        before = self._pins.get(f"{repo}@{revision}")
        commits = before.commits if before else ()
        pin = Pin(repo, revision, last, group, was_public or (before is not None and before.was_public), self._clock(), commits)
        pin = await self._caught_up(pin)
        if not await self.commits(pin):
            raise BadTarget(
                f"this cache has nothing of {pin}: nearhub prefetch {pin} brings it, and nearhub ls shows what is here"
            )
        await self._write(pin)
        await self.refresh()
        return pin

    async def _named(self, asked: Repo) -> Repo:
        """As upstream calls it, in whichever scope it is known here."""
        repo = asked
        for scope in Scope:
            repo = await self._catalog.canonical(replace(asked, scope=scope))
            if await self._catalog.manifests(repo):
                break
        return replace(repo, scope=Scope.PUBLIC)

    async def unpin(self, repo: Repo | None = None, revision: str = ALL, *, group: str = "") -> list[Pin]:
        """Of a repo at that revision, or of a group: those pins are no more. Raises BadTarget where there are none."""
        if repo is None and not group:
            raise BadTarget("name a pin, as nearhub pin --list shows it, or a group")
        if repo is not None:
            repo = await self._named(repo)
        gone = [
            pin
            for pin in self._pins.values()
            if (pin.group == group if repo is None else (pin.repo, pin.revision) == (repo, revision))
        ]
        if not gone:
            what = f"the group {group!r}" if repo is None else str(Pin(repo, revision))
            raise BadTarget(f"there is no pin of {what}: nearhub pin --list shows all")
        await self.drop(gone)
        return gone

    async def drop(self, pins: Iterable[Pin]) -> None:
        keys = [str(pin.repo) + "@" + pin.revision for pin in pins]
        for key in keys:
            self._pins.pop(key, None)
        await self._index.run(self._index.delete_many, [_PREFIX + key for key in keys])
        await self.refresh()

    async def _caught_up(self, pin: Pin) -> Pin:
        """With the commit that its branch names now."""
        if pin.revision == ALL or is_commit(pin.revision):
            return pin
        for scope in Scope:
            ref = await self._catalog.ref(replace(pin.repo, scope=scope), pin.revision)
            if ref is not None and ref.commit not in pin.commits[:1]:
                pin = replace(pin, commits=moved(pin.commits, ref.commit, pin.last))
        return pin

    async def _write(self, pin: Pin) -> None:
        row = {name: getattr(pin, name) for name in ("last", "group", "was_public", "at")} | {"commits": list(pin.commits)}
        await self._index.run(self._index.put, f"{_PREFIX}{pin.repo}@{pin.revision}", row)
        self._pins[f"{pin.repo}@{pin.revision}"] = pin

    # — keeping up ——————————————————————————————————————————————————————————————————————————————————

    async def load(self) -> None:
        """What was pinned before."""
        for key, row in await self._index.run(self._index.scan, _PREFIX):
            pin = _from_row(key.removeprefix(_PREFIX), row)
            self._pins[f"{pin.repo}@{pin.revision}"] = pin
        await self.refresh()

    async def refresh(self) -> None:
        """Work out anew what is kept."""
        async with self._refreshing:  # else one that began earlier, and knew less, could have the last word
            await self._refresh()

    async def _refresh(self) -> None:
        found: set[Holding] = set()
        awaited = {}
        for pin in self.all:
            news = await self._caught_up(pin)
            if news != pin:
                await self._write(news)
            for repo, commit in await self.commits(news):
                found.update(await self._blobs(repo, commit))
            if pin.revision == ALL:
                found.add(BareId.of(pin.repo))
            elif news.commits[news.last :] and (missing := await self._missing(news.repo, news.commits[0])):
                awaited[str(news)] = missing
        self._awaited = awaited
        self._holdings = frozenset(found)
        self._open = frozenset(pin.repo for pin in self._pins.values() if pin.was_public)

    def start(self) -> None:
        """Keep up with the catalog's news from now on."""
        self._catalog.on_news = self._note
        self._task = asyncio.get_running_loop().create_task(self._keep_up(), name="pins")

    def _note(self, repo: Repo) -> None:
        if any(pin.repo.name == repo.name and pin.repo.kind is repo.kind for pin in self._pins.values()):
            self._news.set()

    def note_complete(self, blob: BlobId) -> None:
        """All of it is here now."""
        for missing in self._awaited.values():
            if blob in missing:
                missing.discard(blob)
                if not missing:
                    self._news.set()

    async def _keep_up(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                await self.refresh()
            except NearhubError as exc:  # what was kept stays so
                log.warning("pins: %s", exc)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task


def _from_row(key: str, row: dict[str, Any]) -> Pin:
    repo, _, revision = key.partition("@")
    return Pin(
        Repo.from_text(repo),
        revision,
        int(row["last"]),
        str(row["group"]),
        bool(row["was_public"]),
        float(row["at"]),
        tuple(row["commits"]),
    )
