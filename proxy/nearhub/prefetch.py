"""Prefetch: a repo at a revision, brought before anybody asks: its manifest and tree, its refs, its files, its git objects.

Nobody waits for it, so it takes what clients leave: at most a quarter of the bulk connections, and no more than its budget. All
of it goes through what clients use (door, rules, Resolver, FillEngine, GitMirrors): what is stopped in the middle is continued,
and what a client asks for meanwhile is joined.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from nearhub.access import Access
from nearhub.budget import Budget
from nearhub.documents import Documents
from nearhub.errors import BadTarget, HubRefusal, NearhubError, UpstreamError
from nearhub.fill import FillEngine, Source
from nearhub.git.mirrors import GitMirrors
from nearhub.resolve import Resolver, default
from nearhub.store.bares import BareId
from nearhub.wire.credentials import EVERYONE, Caller
from nearhub.wire.headers import FileMetadata
from nearhub.wire.manifest import Entry
from nearhub.wire.target import DEFAULT_REVISION, FileTarget, Repo, format_api

log = logging.getLogger(__name__)

AT_ONCE = 8
"""Files under way at the same time: small ones would wait for each other's round trips."""
NEWS_S = 0.5
ADDRESS = "prefetch"
"""What stands for its address, where clients have theirs."""
_MOST_FAILURES = 100
"""Named in an answer."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to bring. `include`, `exclude`: patterns of paths as huggingface_hub's allow_patterns and ignore_patterns."""

    repo: Repo
    revision: str = DEFAULT_REVISION
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    with_git: bool = False

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}"


@dataclass(slots=True)
class Tally:
    """How far it is. `brought`: bytes that came now; `failed`: file → what is wrong and whose fault it is."""

    wanted: Wanted
    commit: str = ""
    files: int = 0
    bytes: int = 0
    done_files: int = 0
    done_bytes: int = 0
    under_way: dict[str, int] = field(default_factory=dict)
    present_bytes: int = 0
    failed: list[dict[str, str]] = field(default_factory=list)

    def progress(self) -> dict[str, Any]:
        """A line of progress: bytes, and files beside."""
        return {
            "done": self.done_bytes + sum(self.under_way.values()),
            "of": self.bytes,
            "files": self.done_files,
            "of_files": self.files,
            "what": str(self.wanted),
        }

    def result(self, seconds: float) -> dict[str, Any]:
        return {
            "repo": str(self.wanted.repo),
            "revision": self.wanted.revision,
            "commit": self.commit,
            "files": self.files,
            "bytes": self.bytes,
            "done_files": self.done_files,
            "done_bytes": self.done_bytes,
            "brought_bytes": self.done_bytes - self.present_bytes,
            "failed": self.failed,
            "seconds": round(seconds, 3),
        }

    def fail(self, what: str, exc: NearhubError) -> None:
        log.warning("prefetch of %s: %s: %s (%s's fault)", self.wanted, what, exc.message, exc.fault)
        if len(self.failed) < _MOST_FAILURES:
            self.failed.append({"file": what, "error": exc.message, "fault": exc.fault})


def chosen(paths: Iterable[str], include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Those that match any of `include` (if there are any), and none of `exclude`; `dir/` means all that is below it."""
    wanted = [f"{pattern}*" if pattern.endswith("/") else pattern for pattern in include]
    unwanted = [f"{pattern}*" if pattern.endswith("/") else pattern for pattern in exclude]
    return [
        path
        for path in paths
        if (not wanted or any(fnmatchcase(path, pattern) for pattern in wanted))
        and not any(fnmatchcase(path, pattern) for pattern in unwanted)
    ]


class Prefetcher:
    """`budget`: of all that is brought without a rate of its own. `trusted`: the groups that policies let in."""

    def __init__(
        self,
        access: Access,
        resolver: Resolver,
        documents: Documents,
        fills: FillEngine,
        mirrors: GitMirrors,
        budget: Budget,
        trusted: Iterable[str] = (),
    ) -> None:
        self._access = access
        self._resolver = resolver
        self._documents = documents
        self._fills = fills
        self._mirrors = mirrors
        self._budget = budget
        self._caller = Caller(ADDRESS, groups=frozenset({EVERYONE, *trusted}))

    @property
    def is_offline(self) -> bool:
        """Whether nothing can be brought now."""
        return self._resolver.is_offline

    async def run(self, wanted: Wanted, rate: float | None = None) -> AsyncGenerator[dict[str, Any]]:
        """Bring it. Yields lines of progress, and last the result, in which each file that could not be had is named.

        `rate`: bytes per second, instead of the usual budget. Raises NearhubError when not even the manifest can be had.
        Closed or cancelled: what came stays, and the next run goes on from there.
        """
        started = time.monotonic()
        tally = Tally(wanted)
        repo, entries = await self._look_up(wanted, tally)
        yield tally.progress()
        budget = self._budget if rate is None else Budget(rate)
        work = asyncio.ensure_future(self._bring_all(repo, entries, tally, budget))
        try:
            while not work.done():
                await asyncio.wait([work], timeout=NEWS_S)
                yield tally.progress()
            work.result()
        finally:
            work.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.wait([work])
        yield {"result": tally.result(time.monotonic() - started)}

    async def _look_up(self, wanted: Wanted, tally: Tally) -> tuple[Repo, list[Entry]]:
        """The repo as its door shows it, and the files that are to be brought."""
        revision, began_at = default(wanted.revision), time.time()
        repo = await self._access.authorise(wanted.repo, revision, self._caller)
        tally.commit = await self._resolver.commit_since(repo, revision, ADDRESS, began_at)
        known = {entry.path: entry for entry in await self._resolver.all_files(repo, tally.commit, ADDRESS)}
        with suppress(UpstreamError, HubRefusal):  # a nicety: without them, the refs that were asked for are known
            await self._documents.get(format_api(repo, "refs"), ADDRESS, ttl_s=0.0, about=repo)
        entries = [known[path] for path in chosen(known, wanted.include, wanted.exclude)]
        if known and not entries:
            raise BadTarget(f"{wanted} has {len(known)} files, and no path of them matches what was asked for")
        tally.files, tally.bytes = len(entries), sum(entry.size for entry in entries)
        return repo, entries

    async def _bring_all(self, repo: Repo, entries: Sequence[Entry], tally: Tally, budget: Budget) -> None:
        left = iter(entries)

        async def work() -> None:
            for entry in left:  # shared: each takes the next
                await self._bring(repo, entry, tally, budget)

        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(work())
            if tally.wanted.with_git:
                group.create_task(self._bring_git(repo, tally))

    async def _bring(self, repo: Repo, entry: Entry, tally: Tally, budget: Budget) -> None:
        assert entry.blob is not None
        source = Source(FileTarget(repo, tally.commit, entry.path), FileMetadata(tally.commit, entry.blob, entry.size))
        try:
            await self._access.admit(repo, tally.commit, [(entry.path, entry.size)], self._caller)
            async with aclosing(self._fills.bring(source, budget, ADDRESS)) as counts:
                tally.under_way[entry.path] = await anext(counts)
                tally.present_bytes += tally.under_way[entry.path]
                async for tally.under_way[entry.path] in counts:
                    pass
        except NearhubError as exc:
            tally.fail(entry.path, exc)
        else:
            tally.done_files += 1
            tally.done_bytes += entry.size
        finally:
            tally.under_way.pop(entry.path, None)

    async def _bring_git(self, repo: Repo, tally: Tally) -> None:
        try:
            async with self._mirrors.lend(repo, ADDRESS, must_be_fresh=True):
                pass
        except NearhubError as exc:
            tally.fail(str(BareId.of(repo)), exc)
