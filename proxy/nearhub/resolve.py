"""Resolver: Target → what it is, from the Catalog; asks upstream when freshness says so, and records what it hears.

One call, `/api/{kind}/{repo}/revision/{rev}?blobs=true`, tells the commit, every file, and who may see the repo. What a path is
at a commit never changes (P11); only ref → commit ages, and visibility (access.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from nearhub import trace
from nearhub.bounded import Bounded
from nearhub.catalog import Catalog, Manifest
from nearhub.errors import (
    GONE,
    AccessRefused,
    EntryNotFound,
    HubRefusal,
    NearhubError,
    RepoNotFound,
    UnknownOffline,
    UpstreamError,
    UpstreamFailed,
    UpstreamLied,
    UpstreamUnreachable,
)
from nearhub.single_flight import SingleFlight
from nearhub.upstream.dispatch import Dispatcher
from nearhub.wire.freshness import Decision, decide
from nearhub.wire.headers import FileMetadata
from nearhub.wire.manifest import SIBLINGS_TRUSTED, Entry, RepoInfo, below, read_info, read_tree, tree_order, with_directories
from nearhub.wire.target import DEFAULT_REVISION, FileTarget, Repo, format_api, is_commit

log = logging.getLogger(__name__)

REFUSED_TTL_S = 10.0
"""How long a no of the Hub is repeated without asking again (reliability B20)."""
MAX_TREE_PAGES = 10
"""Trees of more pages than this (of 1,000 entries) are not brought whole: asked path by path and page by page."""
MOST_TREE_PAGES = 2000
"""… but for a prefetch, which wants all that there is."""
PAGE = 1000

LONG = 100
"""A manifest of fewer files is asked for whole each time: if the ref has moved, that saves a call."""

_FULL = "?blobs=true"
_LIGHT = "?expand=sha&expand=private&expand=gated&expand=disabled"
"""Enough to renew a ref and visibility where the manifest is known. A Hub that does not know `expand` sends more; no harm."""


@dataclass(frozen=True, slots=True)
class Current:
    """A revision's commit now. `is_stale`: upstream did not answer, and this is what it said last."""

    commit: str
    is_stale: bool = False


@dataclass(frozen=True, slots=True)
class Resolved:
    entry: Entry
    meta: FileMetadata
    is_stale: bool = False


class Resolver:
    """`ref_ttl_s`: for how long ref → commit is believed without asking. `keeps_open`: whether what was public of a repo stays
    so here when upstream closes it (pins.py). Clock: wall seconds."""

    def __init__(
        self,
        catalog: Catalog,
        dispatcher: Dispatcher,
        *,
        ref_ttl_s: float,
        keeps_open: Callable[[Repo], bool] = lambda repo: False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._catalog = catalog
        self._dispatcher = dispatcher
        self.ref_ttl_s = ref_ttl_s
        self._keeps_open = keeps_open
        self._clock = clock
        self._refused: Bounded[tuple[Repo, str], tuple[HubRefusal, float]] = Bounded(10_000)
        self._missing: Bounded[FileTarget, EntryNotFound] = Bounded(10_000)
        self._asking = SingleFlight(clock)

    @property
    def is_offline(self) -> bool:
        """Whether nobody is worth asking: what is known is all there is."""
        return self._dispatcher.connectivity.is_offline

    # — files ——————————————————————————————————————————————————————————————————————————————————————

    async def resolve(self, target: FileTarget, client: str) -> Resolved:
        """What `target` is now; its repo by the canonical name. Raises HubRefusal or UpstreamError."""
        current = await self.commit(target.repo, target.revision, client)
        entry = await self.entry(target.repo, current.commit, target.path, client)
        assert entry.blob is not None
        return Resolved(entry, FileMetadata(current.commit, entry.blob, entry.size), current.is_stale)

    async def entry(self, repo: Repo, commit: str, path: str, client: str) -> Entry:
        """The file at `path`. Raises EntryNotFound, with the commit, only where that is certain."""
        entry = await self._catalog.entry(repo, commit, path)
        if entry is not None:
            return entry
        manifest = await self.manifest(repo, commit, client)
        repo = await self._catalog.canonical(repo)
        entry = await self._catalog.entry(repo, commit, path)
        if entry is not None:
            return entry
        if manifest.has_files:
            raise _no_entry(repo, commit, path)
        return await self._ask_for_path(FileTarget(repo, commit, path), client)

    async def _ask_for_path(self, target: FileTarget, client: str) -> Entry:
        """HEAD: of a repo of too many files for its manifest."""
        if (missing := self._missing.get(target)) is not None:
            raise missing
        trace.note(f"{target.path}: not in the part of the manifest that is known: upstream is asked by HEAD")
        return await self._asking.share(target, lambda: self._head(target, client))

    async def _head(self, target: FileTarget, client: str) -> Entry:
        try:
            meta = await self._dispatcher.metadata(target, client)
        except EntryNotFound as exc:
            missing = EntryNotFound(exc.message, target.revision)
            self._missing.put(target, missing)
            raise missing from None
        except UpstreamUnreachable as exc:
            raise unknown(str(target), exc) from exc
        if meta.commit != target.revision:
            raise UpstreamLied(f"upstream answered with commit {meta.commit} for {target}")
        oid = None if meta.blob.algo == "sha256" else meta.blob.hex
        entry = Entry(target.path, meta.size, oid, meta.blob)
        for recorded in await self._catalog.note_entries(target.repo, meta.commit, [entry], meta.source):
            return recorded
        raise UpstreamLied(f"upstream has {target}, which was not there when all files of that commit were told")

    # — refs ———————————————————————————————————————————————————————————————————————————————————————

    async def commit(self, repo: Repo, revision: str, client: str) -> Current:
        """The commit of `revision` now. Raises HubRefusal or UpstreamError where nothing is known."""
        revision = default(revision)
        if is_commit(revision):
            return Current(revision)
        ref = await self._catalog.ref(repo, revision)
        age_s = None if ref is None else self._clock() - ref.asked_at
        decision = decide(age_s=age_s, ttl_s=self.ref_ttl_s, grace_s=self.ref_ttl_s, reachable=self._dispatcher.may_ask(repo))
        known = "unknown" if ref is None else f"{ref.commit}, {age_s:.0f} s old"
        trace.note(f"ref {revision}: {known}: {decision.value}")
        if ref is None:
            try:
                return Current((await self.refresh(repo, revision, client)).commit)
            except UpstreamUnreachable as exc:
                raise unknown(f"{repo}@{revision}", exc) from exc
        if decision is Decision.USE_AND_REFRESH:
            self.refresh_soon(repo, revision, client)
        if decision is Decision.REVALIDATE:
            try:
                info = await self.refresh_or_none(repo, revision, client)
            except HubRefusal:
                if not self._keeps_open(repo):
                    raise
                trace.note("upstream has it no more: pinned while it was public, it is served as it was")
                info = None
            return Current(ref.commit, is_stale=True) if info is None else Current(info.commit)
        return Current(ref.commit, is_stale=decision is Decision.USE_STALE)

    async def commit_since(self, repo: Repo, revision: str, client: str, since: float) -> str:
        """The commit of `revision` as upstream told it at wall-clock second `since` or later; offline, as it told it last."""
        ref = await self._catalog.ref(repo, revision)
        if is_commit(revision) or self.is_offline or (ref is not None and ref.asked_at >= since):
            return (await self.commit(repo, revision, client)).commit
        return (await self.refresh(repo, revision, client)).commit

    async def refresh_or_none(self, repo: Repo, revision: str, client: str) -> RepoInfo | None:
        """Ask upstream; None when it does not answer, or not soon enough. Raises HubRefusal."""
        revision = default(revision)
        self._repeat_refusal(repo, revision)
        return await self._asking.share_or_none((repo, revision), lambda: self._refresh(repo, revision, client))

    def refresh_soon(self, repo: Repo, revision: str, client: str) -> None:
        """Ask upstream in the background. What goes wrong is heard of by the next request that must know."""

        async def ask() -> None:
            trace.begin()  # its own: the request that is answered meanwhile does not wait for this
            try:
                await self.refresh(repo, revision, client)
            except NearhubError as exc:
                log.info("%s@%s could not be refreshed: %s", repo, revision, exc)

        self._asking.start(("soon", repo, revision), ask)

    async def refresh(self, repo: Repo, revision: str, client: str) -> RepoInfo:
        """Ask upstream what `revision` is, with nobody's token unless the repo is restricted; many at once share one call.

        What is learnt is recorded, in the repo's scope.
        """
        revision = default(revision)
        self._repeat_refusal(repo, revision)
        return await self._asking.share((repo, revision), lambda: self._refresh(repo, revision, client))

    def _repeat_refusal(self, repo: Repo, revision: str) -> None:
        refused = self._refused.get((repo, revision))
        if refused is not None and 0 <= self._clock() - refused[1] < REFUSED_TTL_S:
            raise refused[0]

    async def _refresh(self, repo: Repo, revision: str, client: str) -> RepoInfo:
        try:
            info = await self._ask(repo, revision, client)
        except HubRefusal as exc:
            self._refused.put((repo, revision), (exc, self._clock()))
            if isinstance(exc, (RepoNotFound, AccessRefused)) and not repo.is_restricted:
                canonical = await self._catalog.canonical(repo)
                if not self._keeps_open(canonical):
                    await self._catalog.note_closed(canonical)
            raise
        if is_commit(revision) and info.commit != revision:
            raise UpstreamLied(f"upstream answered with commit {info.commit} for {repo}@{revision}")
        info = replace(info, repo=replace(info.repo, scope=repo.scope))
        await self._catalog.note_alias(repo, info.repo)
        if not repo.is_restricted:
            await self._catalog.note_seen(info.repo, info.visibility)
        if info.entries is not None:
            await self._catalog.note_info(info)
        if not is_commit(revision):
            await self._catalog.move_refs(info.repo, {revision: info.commit})
        return info

    async def _ask(self, repo: Repo, revision: str, client: str) -> RepoInfo:
        path = format_api(repo, "revision", revision)
        if await self._is_known_and_long(await self._catalog.canonical(repo), revision):
            trace.note(f"upstream is asked for the commit of {repo}@{revision}")
            document = await self._dispatcher.document(path + _LIGHT, client, about=repo)
            if isinstance(document.value, dict) and "sha" in document.value:
                return replace(read_info(repo.kind, document.value), source=document.source)
        trace.note(f"upstream is asked for the manifest of {repo}@{revision}")
        document = await self._dispatcher.document(path + _FULL, client, about=repo)
        return replace(read_info(repo.kind, document.value), source=document.source)

    async def _is_known_and_long(self, repo: Repo, revision: str) -> bool:
        """Whether there is a manifest for what `revision` was last, so long that it is not worth sending again."""
        ref = None if is_commit(revision) else await self._catalog.ref(repo, revision)
        commit = revision if is_commit(revision) else ref.commit if ref else None
        manifest = None if commit is None else await self._catalog.manifest(repo, commit)
        return manifest is not None and manifest.count >= LONG

    # — manifests ——————————————————————————————————————————————————————————————————————————————————

    async def manifest(self, repo: Repo, commit: str, client: str) -> Manifest:
        """What is known of `repo` at `commit`; asked for once, ever.

        By asking, one may learn that the repo has a new name: it is recorded under that one (Catalog.canonical).
        """
        manifest = await self._catalog.manifest(repo, commit)
        if manifest is None:
            try:
                info = await self.refresh(repo, commit, client)
            except UpstreamUnreachable as exc:
                raise unknown(f"{repo}@{commit}", exc) from exc
            manifest = await self._catalog.manifest(info.repo, commit)
            if manifest is None:  # upstream did not list its files: they are asked for one by one
                manifest = await self._catalog.note_info(info)
        return manifest

    async def files(self, repo: Repo, commit: str, client: str) -> list[Entry]:
        """All files; those that are known of a repo that is too large, or that only a copy told of and upstream cannot."""
        manifest = await self.manifest(repo, commit, client)
        repo = await self._catalog.canonical(repo)
        failure: UpstreamError | HubRefusal | None = None
        if not manifest.has_files and not manifest.is_huge:
            try:
                await self._walk(repo, commit, client)
            except (UpstreamError, *GONE) as exc:
                failure = exc
        files = await self._known_files(repo, commit)
        if failure is not None and (not files or len(files) >= SIBLINGS_TRUSTED):  # upstream's own list, cut short
            raise failure
        return files

    async def all_files(self, repo: Repo, commit: str, client: str) -> list[Entry]:
        """All files, and their directories known from now on, however many pages of the tree that takes."""
        manifest = await self.manifest(repo, commit, client)
        repo = await self._catalog.canonical(repo)
        if not manifest.has_tree:
            await self._asking.share(("all", repo, commit), lambda: self._bring_tree(repo, commit, client, MOST_TREE_PAGES))
        return await self._known_files(repo, commit)

    async def _known_files(self, repo: Repo, commit: str) -> list[Entry]:
        listing = await self._catalog.listing(repo, commit, recursive=True)
        return [entry for entry in listing if not entry.is_directory]

    async def tree(
        self, repo: Repo, commit: str, directory: str, client: str, *, recursive: bool, after: str, limit: int
    ) -> list[Entry] | None:
        """At most `limit` entries below `directory`, in git's order; None: the tree is too large to be known whole.

        Raises EntryNotFound. When upstream cannot be asked for the directories, they are made from the files.
        """
        manifest = await self.manifest(repo, commit, client)
        repo = await self._catalog.canonical(repo)
        if not manifest.has_tree and not manifest.is_huge:
            try:
                manifest = await self._walk(repo, commit, client)
            except (UpstreamError, *GONE):  # commits vanish upstream, ours stay
                files = await self.files(repo, commit, client)
                trace.note("upstream cannot be asked for the directories: they are made from the files")
                made = below(with_directories(files), directory, recursive=recursive)
                if not made and directory:
                    raise _no_entry(repo, commit, directory) from None
                return [entry for entry in made if tree_order(entry) > after][:limit]
        if not manifest.has_tree and manifest.is_huge:
            return None
        found = await self._catalog.listing(repo, commit, directory, recursive=recursive, after=after, limit=limit)
        if not found and directory and not after:
            return [await self.entry(repo, commit, directory, client)]
        return found

    async def _walk(self, repo: Repo, commit: str, client: str) -> Manifest:
        """Bring the recursive tree: the second metadata call, and the last, for a repo of up to 1,000 entries."""
        try:
            return await self._asking.share(("walk", repo, commit), lambda: self._bring_tree(repo, commit, client))
        except UpstreamUnreachable as exc:
            raise unknown(f"the tree of {repo}@{commit}", exc) from exc

    async def _bring_tree(self, repo: Repo, commit: str, client: str, pages: int | None = None) -> Manifest:
        manifest = await self.manifest(repo, commit, client)
        trace.note(f"upstream is asked for the tree of {repo}@{commit}")
        query: str | None = f"recursive=true&expand=false&limit={PAGE}"
        for _ in range(pages or MAX_TREE_PAGES):
            path = format_api(repo, "tree", commit)
            document = await self._dispatcher.document(f"{path}?{query}", client, about=repo)
            await self._catalog.note_entries(repo, commit, read_tree(document.value), document.source)
            if document.next_query is None:
                return await self._catalog.note_tree(repo, commit, manifest)
            if document.next_query == query:
                raise UpstreamFailed("upstream's tree goes round in circles")
            query = document.next_query
        return await self._catalog.note_huge(repo, commit, manifest)

    async def paths(self, repo: Repo, commit: str, paths: list[str], client: str) -> list[Entry]:
        """Files and directories of these names; unknown ones are left out."""
        manifest = await self.manifest(repo, commit, client)
        repo = await self._catalog.canonical(repo)
        if not manifest.has_tree and not manifest.is_huge:
            try:
                manifest = await self._walk(repo, commit, client)
            except (UpstreamError, *GONE):
                if not manifest.has_files:
                    raise
                made = {entry.path: entry for entry in with_directories(await self.files(repo, commit, client))}
                return [made[path] for path in paths if path in made]
        found, unknown_paths = [], []
        for path in paths:
            entry = await self._catalog.entry(repo, commit, path) or await self._catalog.entry(repo, commit, f"{path}/")
            if entry is not None:
                found.append(entry)
            else:
                unknown_paths.append(path)
        if unknown_paths and manifest.is_huge:
            document = await self._dispatcher.document(
                format_api(repo, "paths-info", commit), client, {"paths": unknown_paths, "expand": False}, about=repo
            )
            found += await self._catalog.note_entries(repo, commit, read_tree(document.value), document.source)
        return found

    async def close(self) -> None:
        """End the questions under way."""
        await self._asking.close()


def default(revision: str) -> str:
    """`HEAD` is how huggingface.js calls the default branch, and that is main on every Hub."""
    return DEFAULT_REVISION if revision == "HEAD" else revision


def _no_entry(repo: Repo, commit: str, path: str) -> EntryNotFound:
    return EntryNotFound(f"{repo} has no file {path!r} at {commit}", commit)


def unknown(what: str, exc: UpstreamUnreachable) -> UnknownOffline:
    return UnknownOffline(f"{what} is not in this mirror, and upstream cannot be asked: {exc.message}")
