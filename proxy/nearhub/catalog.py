"""Catalog: what the mirror knows of repos, in memory and in the index. Its owner; it never asks anybody.

    alias [restricted ]<kind>/<name in lower case>  → the name upstream calls it by (renames, other cases)
    visible <repo>                         → when an anonymous question was answered, and whether the repo is gated
    ref <scope> <repo>@<revision>          → commit, when it was asked
    manifest <scope> <repo>@<commit>       → what the repo said of itself there, and how much of its files is known
    path <scope> <repo>@<commit>:<path>    → etag, size, oid; a directory's path ends in "/"; append-only (P11)
    lfs <scope> <repo>#<oid>               → size of an LFS object the repo has; a commit and path, if known; append-only

`scope` is the repo's (wire.target.Scope): what is learnt with a token is never read for others. A row a path, so that one path
costs one look-up, and a repo of a million files no more than a small one. Tables in memory are bounded; a warm look-up touches
neither thread nor disk.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nearhub.bounded import Bounded
from nearhub.errors import StoreFull
from nearhub.metrics import Metrics
from nearhub.store.index import Index
from nearhub.store.log import TransparencyLog
from nearhub.wire.manifest import Entry, RepoInfo, Visibility, entry_from_row, entry_row, tree_order
from nearhub.wire.target import DEFAULT_REVISION, Repo, RepoKind, Scope, is_commit

log = logging.getLogger(__name__)

_MANIFEST = "manifest "
_SCAN = 256
"""Rows read from the index at a time where a directory is listed."""
_AFTER_SLASH = "0"
"""The character after "/"."""
_MOST_RENAMES = 5
_FIRST = "\x01"
"""Sorts before all that a path may hold."""


@dataclass(frozen=True, slots=True)
class Ref:
    """What a movable revision was at wall-clock second `asked_at`."""

    commit: str
    asked_at: float


@dataclass(frozen=True, slots=True)
class Seen:
    """What an anonymous question told at wall-clock second `at`."""

    visibility: Visibility
    at: float


@dataclass(frozen=True, slots=True)
class Basis:
    """What an answer about a repo at a revision follows from. `ref` None: the revision is a commit."""

    repo: Repo
    revision: str
    seen: Seen | None
    ref: Ref | None


@dataclass(frozen=True, slots=True)
class Manifest:
    """How much is known of a repo at a commit.

    `has_files`: all of them, so that what is not there does not exist. `has_tree`: the directories too, as upstream names them.
    `is_huge`: too many to be brought at once; asked path by path. `count`: of the files that came with it.
    """

    about: dict[str, Any]
    has_files: bool
    has_tree: bool = False
    is_huge: bool = False
    learnt_at: float = 0.0
    count: int = 0


@dataclass(frozen=True, slots=True)
class Delivery:
    """What another mirror, or a copy, knows of a repo at a commit. `entries`: all of them where `manifest` has its files.

    `seen` None: not known to be seen by everybody. `closed_at`: known not to be, at that wall-clock second.
    """

    repo: Repo
    commit: str
    manifest: Manifest
    entries: tuple[Entry, ...]
    refs: Mapping[str, Ref]
    seen: Seen | None
    closed_at: float | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LfsObject:
    """One that a repo has. `size` in bytes.

    `commit` and `path` name a file of it. None: upstream's batch alone said so, and may have repeated the asker's size.
    """

    size: int
    commit: str | None = None
    path: str | None = None

    def proves(self, size: int) -> bool:
        """Whether there is nothing to ask upstream about an object of that size."""
        return self.commit is not None or self.size == size


class Catalog:
    """Bounded tables over the index. `record`: where else it goes what a commit's files are. Clock: wall seconds."""

    def __init__(
        self,
        index: Index,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
        *,
        record: TransparencyLog | None = None,
    ) -> None:
        self._index = index
        self._record = record
        self._metrics = metrics
        self._clock = clock
        self.on_news: Callable[[Repo], None] = lambda repo: None
        """Called when a revision of a repo moved, or a manifest became known."""
        self._aliases: Bounded[Repo, Repo] = Bounded(10_000)
        self._seen: Bounded[Repo, Seen] = Bounded(10_000)
        self._refs: Bounded[tuple[Repo, str], Ref] = Bounded(10_000)
        self._manifests: Bounded[tuple[Repo, str], Manifest] = Bounded(200)
        self._entries: Bounded[tuple[Repo, str, str], Entry] = Bounded(50_000)
        self._absent: Bounded[tuple[Repo, str, str], bool] = Bounded(50_000)
        self._objects: Bounded[tuple[Repo, str], LfsObject] = Bounded(20_000)
        self._gathered: Bounded[tuple[Repo, str], bool] = Bounded(10_000)

    # — names —————————————————————————————————————————————————————————————————————————————————————

    async def canonical(self, repo: Repo) -> Repo:
        """The repo that upstream means by this name, as far as is known."""
        for _ in range(_MOST_RENAMES):
            onward = await self._alias(repo)
            if onward == repo:
                break
            repo = onward
        return repo

    async def _alias(self, repo: Repo) -> Repo:
        known = self._aliases.get(repo)
        if known is None:
            row = await self._index.run(self._index.get, _alias_key(repo))
            known = repo if row is None else replace(repo, name=str(row["name"]))
            self._aliases.put(repo, known)
        return replace(repo, name=known.name)

    async def note_alias(self, asked: Repo, repo: Repo) -> None:
        """Upstream, asked for `asked`, answered for `repo`. Names are found in any case."""
        news = [name for name in (asked, repo) if await self._alias(name.folded()) != repo]
        if news:
            await self._index.keep(self._index.put_many, [(_alias_key(name), {"name": repo.name}) for name in news])
        for name in (asked, asked.folded(), repo, repo.folded()):
            self._aliases.put(name, repo)

    async def aliases(self, repo: Repo) -> list[str]:
        """Other names of `repo`, in lower case."""
        prefix = f"alias {repo.kind}/"
        rows = await self._index.run(self._index.scan, prefix)
        found = (key.removeprefix(prefix) for key, row in rows if row["name"] == repo.name)
        return [name for name in found if name != repo.name.lower()]

    # — visibility ————————————————————————————————————————————————————————————————————————————————

    async def seen(self, repo: Repo) -> Seen | None:
        """None: never seen in public, or closed since."""
        known = self._seen.get(repo)
        if known is None and (row := await self._index.run(self._index.get, _seen_key(repo))) is not None:
            known = Seen(Visibility(bool(row["gated"]), bool(row["disabled"])), float(row["at"]))
            self._seen.put(repo, known)
        return known

    async def note_seen(self, repo: Repo, visibility: Visibility) -> None:
        seen = Seen(visibility, self._clock())
        self._seen.put(repo, seen)
        row = {"at": seen.at, "gated": visibility.is_gated, "disabled": visibility.is_disabled}
        await self._index.keep(self._index.put, _seen_key(repo), row)

    async def note_closed(self, repo: Repo) -> None:
        """It is deleted or private now. What is known of its content stays, and is shown to nobody."""
        self._seen.drop(repo)
        await self._index.keep(self._index.delete_many, [_seen_key(repo)])

    async def public_repos(self, kind: RepoKind) -> list[dict[str, Any]]:
        """What is known of each public repo of a kind: its document at the last known commit of the default branch."""
        return await self._index.run(self._public_repos, kind)

    def _public_repos(self, kind: RepoKind) -> list[dict[str, Any]]:
        found = []
        for key, seen in self._index.scan("visible "):
            repo = Repo.from_text(key.removeprefix("visible "))
            if repo.kind is not kind or seen["disabled"]:
                continue
            ref = self._index.get(_ref_key(repo, DEFAULT_REVISION))
            row = self._index.get(_manifest_key(repo, ref["commit"])) if ref else None
            if row is not None and ref is not None:
                found.append({**row["about"], "sha": ref["commit"]})
        return found

    # — refs ——————————————————————————————————————————————————————————————————————————————————————

    async def ref(self, repo: Repo, revision: str) -> Ref | None:
        key = (repo, revision)
        ref = self._refs.get(key)
        if ref is None and (row := await self._index.run(self._index.get, _ref_key(repo, revision))) is not None:
            ref = Ref(str(row["commit"]), float(row["asked_at"]))
            self._refs.put(key, ref)
        return ref

    async def move_refs(self, repo: Repo, commits: dict[str, str]) -> None:
        """Revision → commit, as upstream says now."""
        now = self._clock()
        has_moved = False
        for revision, commit in commits.items():
            before = self._refs.get((repo, revision))
            has_moved |= before is None or before.commit != commit
            self._refs.put((repo, revision), Ref(commit, now))
        rows = [(_ref_key(repo, revision), {"commit": commit, "asked_at": now}) for revision, commit in commits.items()]
        await self._index.keep(self._index.put_many, rows)
        if has_moved:
            self.on_news(repo)

    async def refs(self, repo: Repo) -> dict[str, str]:
        """Every known revision name → commit."""
        prefix = _ref_key(repo, "")
        rows = await self._index.run(self._index.scan, prefix)
        return {key.removeprefix(prefix): str(row["commit"]) for key, row in rows}

    def basis(self, repo: Repo, revision: str) -> Basis:
        """What is known now, in memory."""
        return Basis(repo, revision, self._seen.get(repo), None if is_commit(revision) else self._refs.get((repo, revision)))

    def holds(self, basis: Basis) -> bool:
        """Whether nothing was heard since that could change what follows from it."""
        if basis.seen is None or self._seen.get(basis.repo) is not basis.seen:
            return False
        return basis.ref is None or self._refs.get((basis.repo, basis.revision)) is basis.ref

    # — manifests —————————————————————————————————————————————————————————————————————————————————

    async def manifest(self, repo: Repo, commit: str) -> Manifest | None:
        key = (repo, commit)
        manifest = self._manifests.get(key)
        if manifest is None and (row := await self._index.run(self._index.get, _manifest_key(repo, commit))) is not None:
            manifest = Manifest(
                row["about"],
                row["has_files"],
                row["has_tree"],
                row["is_huge"],
                float(row["learnt_at"]),
                int(row.get("count", 0)),
            )
            self._manifests.put(key, manifest)
        return manifest

    async def note_info(self, info: RepoInfo) -> Manifest:
        """An answer about a repo at a commit. What is known already stays (P11)."""
        known = await self.manifest(info.repo, info.commit)
        if info.entries is not None:
            try:
                await self.note_entries(info.repo, info.commit, info.entries, info.source)
            except StoreFull as exc:  # good for now; asked for again when there is room
                log.warning("the manifest of %s is not kept: %s", info.repo, exc)
                for entry in info.entries:
                    self._entries.put((info.repo, info.commit, entry.path), entry)
                return Manifest(info.about, has_files=False, is_huge=True, learnt_at=self._clock())
        if known is not None and (known.has_files or not info.is_complete):
            return known
        is_huge = known is not None and known.is_huge
        manifest = Manifest(
            info.about, info.is_complete, is_huge=is_huge, learnt_at=self._clock(), count=len(info.entries or ())
        )
        return await self._put(info.repo, info.commit, manifest)

    async def note_tree(self, repo: Repo, commit: str, manifest: Manifest) -> Manifest:
        """All pages of the recursive tree have been recorded."""
        return await self._put(repo, commit, replace(manifest, has_files=True, has_tree=True))

    async def note_huge(self, repo: Repo, commit: str, manifest: Manifest) -> Manifest:
        return await self._put(repo, commit, replace(manifest, is_huge=True))

    async def _put(self, repo: Repo, commit: str, manifest: Manifest) -> Manifest:
        self._manifests.put((repo, commit), manifest)
        row = {name: getattr(manifest, name) for name in Manifest.__dataclass_fields__}
        await self._index.keep(self._index.put, _manifest_key(repo, commit), row)
        self.on_news(repo)
        return manifest

    async def manifests(self, repo: Repo | None = None) -> list[tuple[Repo, str]]:
        """(repo, commit) of every manifest, or of every one of a repo in its scope."""
        prefix = _manifest_key(repo, "") if repo else _MANIFEST
        keys = await self._index.run(lambda: list(self._index.keys(prefix)))
        found = []
        for key in keys:
            name, _, commit = key.removeprefix(_MANIFEST).rpartition("@")
            scope, _, name = name.partition(" ")
            found.append((replace(Repo.from_text(name), scope=Scope(scope)), commit))
        return found

    async def forget(self, repo: Repo, commits: Sequence[str], refs: Sequence[str], *, whole: bool) -> None:
        """Forget manifests and refs, and with `whole` that the repo was ever seen. What a commit's paths are stays (P11)."""
        keys = [_manifest_key(repo, commit) for commit in commits] + [_ref_key(repo, ref) for ref in refs]
        for commit in commits:
            self._manifests.drop((repo, commit))
        for ref in refs:
            self._refs.drop((repo, ref))
        if whole:
            self._seen.drop(repo)
            keys.append(_seen_key(repo))
        await self._index.run(self._index.delete_many, keys)

    # — paths —————————————————————————————————————————————————————————————————————————————————————

    async def entry(self, repo: Repo, commit: str, path: str) -> Entry | None:
        """The file at `path` (with "/" at its end: the directory), or None: not known.

        Only Manifest.has_files tells whether that means it does not exist.
        """
        key = (repo, commit, path)
        entry = self._entries.get(key)
        if entry is not None or self._absent.get(key):
            return entry
        row = await self._index.run(self._index.get, _path_key(repo, commit, path))
        if row is not None:
            entry = entry_from_row(path.removesuffix("/"), row)
            self._entries.put(key, entry)
        elif (manifest := self._manifests.get((repo, commit))) is not None and manifest.has_files:
            self._absent.put(key, True)
        return entry

    async def note_entries(self, repo: Repo, commit: str, entries: Iterable[Entry], source: str = "") -> list[Entry]:
        """P11: recorded once, for ever; a later different answer is an alarm. Returns what is recorded, now or earlier.

        A new file at a commit of which all files are known is a different answer too. `source`: who said it.
        """
        known = await self.manifest(repo, commit)
        is_closed = known is not None and known.has_files
        recorded, conflicts = await self._index.run(self._add, repo, commit, tuple(entries), is_closed, source)
        if self._record is not None:
            self._record.wake()
        for entry, there in conflicts:
            self._metrics.alarms.inc()
            log.error("ALARM: upstream now says %s@%s:%s is %s; it was %s", repo, commit, entry.path, entry, there)
        for entry in recorded:
            key = (repo, commit, tree_order(entry))
            if self._entries.get(key) is not None:
                self._entries.put(key, entry)
        return recorded

    def _add(
        self, repo: Repo, commit: str, entries: Sequence[Entry], is_closed: bool, source: str
    ) -> tuple[list[Entry], list[tuple[Entry, Entry | None]]]:
        recorded: list[Entry] = []
        conflicts: list[tuple[Entry, Entry | None]] = []
        new, unheard = [], []
        with self._index.transaction():
            for entry in entries:
                key = _path_key(repo, commit, tree_order(entry))
                row = self._index.get(key)
                there = None if row is None else entry_from_row(entry.path, row)
                if there is None and is_closed and not entry.is_directory:
                    conflicts.append((entry, None))
                    continue
                if there is not None and not there.agrees(entry):
                    conflicts.append((entry, there))
                    recorded.append(there)
                    continue
                knows_more = there is None or (there.oid is None and entry.oid is not None)
                if knows_more:
                    new.append((key, entry_row(entry)))
                if there is None:
                    unheard.append(entry)
                recorded.append(entry if knows_more or there is None else there)
            self._index.put_many(new)
            if self._record is not None:
                self._record.record(repo, commit, unheard, source)
        return recorded, conflicts

    async def record_known(self) -> None:
        """Bring into a new log what was recorded before it began: from an index of an earlier version, or of another log.

        Such leaves name no upstream. Costs a look-up a manifest, once in a log's life.
        """
        record = self._record
        if record is None or await self._index.run(record.is_caught_up):
            return
        for repo, commit in await self.manifests():
            await self._index.run(self._record_commit, record, repo, commit)
        await self._index.run(record.note_caught_up)

    def _record_commit(self, record: TransparencyLog, repo: Repo, commit: str) -> None:
        with self._index.transaction():
            if not record.has(repo, commit):
                record.record(repo, commit, self._list(repo, commit, "", True, "", None), "")

    async def deliver(self, delivery: Delivery, scopes: Iterable[Scope], *, may_go_back: bool = False) -> str | None:
        """Take all of `delivery` in these scopes, in one transaction, or nothing of it.

        What contradicts the record (P11) is an alarm, and the reason is returned: nothing was taken. Refs and visibility
        that are known from later stay, unless it `may_go_back`.
        """
        repos = [replace(delivery.repo, scope=scope) for scope in scopes]
        reason = await self._index.run(self._deliver, delivery, repos, may_go_back)
        if reason is not None:
            self._metrics.alarms.inc()
            log.error("ALARM: %s", reason)
            return reason
        for repo in repos:
            self._manifests.drop((repo, delivery.commit))
            self._gathered.drop((repo, delivery.commit))
            for revision in delivery.refs:
                self._refs.drop((repo, revision))
            for entry in delivery.entries:
                key = (repo, delivery.commit, tree_order(entry))
                self._entries.drop(key)
                self._absent.drop(key)
        self._seen.drop(delivery.repo)
        for name in (delivery.repo.name, *delivery.aliases):
            for scope in Scope:
                alias = replace(delivery.repo, name=name, scope=scope)
                self._aliases.drop(alias)
                self._aliases.drop(alias.folded())
        return None

    def _deliver(self, delivery: Delivery, repos: Sequence[Repo], may_go_back: bool) -> str | None:
        with self._index.transaction():
            conflicts = (self._conflict(repo, delivery) for repo in repos)
            if (conflict := next(filter(None, conflicts), None)) is not None:
                return conflict
            rows: list[tuple[str, dict[str, Any]]] = []
            for repo in repos:
                unheard = []
                for entry in delivery.entries:
                    key = _path_key(repo, delivery.commit, tree_order(entry))
                    row = self._index.get(key)
                    there = None if row is None else entry_from_row(entry.path, row)
                    if there is None or (there.oid is None and entry.oid is not None):
                        rows.append((key, entry_row(entry)))
                    if there is None:
                        unheard.append(entry)
                if self._record is not None:
                    self._record.record(repo, delivery.commit, unheard, "")
                known = self._index.get(_manifest_key(repo, delivery.commit))
                if known is None or _knows_more(delivery.manifest, known):
                    row = {name: getattr(delivery.manifest, name) for name in Manifest.__dataclass_fields__}
                    rows.append((_manifest_key(repo, delivery.commit), row))
                for revision, ref in delivery.refs.items():
                    key = _ref_key(repo, revision)
                    if may_go_back or (row := self._index.get(key)) is None or row["asked_at"] <= ref.asked_at:
                        rows.append((key, {"commit": ref.commit, "asked_at": ref.asked_at}))
                rows += [(key, {"name": repo.name}) for key in self._free_aliases(repo, delivery.aliases)]
            if (seen := delivery.seen) is not None and repos:
                key = _seen_key(delivery.repo)
                if may_go_back or (row := self._index.get(key)) is None or row["at"] <= seen.at:
                    told = {"at": seen.at, "gated": seen.visibility.is_gated, "disabled": seen.visibility.is_disabled}
                    rows.append((key, told))
            row = self._index.get(_seen_key(delivery.repo))
            if row is not None and delivery.closed_at is not None and (may_go_back or row["at"] <= delivery.closed_at):
                self._index.delete_many([_seen_key(delivery.repo)])
            self._index.put_many(rows)
        return None

    def _free_aliases(self, repo: Repo, names: Sequence[str]) -> Iterator[str]:
        """Keys of names that nothing else here has: what comes from elsewhere takes no repo's name away."""
        for name in {repo.name, *names}:
            alias = replace(repo, name=name)
            is_own = name.lower() == repo.name.lower()
            if self._index.get(_alias_key(alias)) is None and (
                is_own or not any(self._index.scan(_manifest_key(replace(alias, scope=scope), ""), limit=1) for scope in Scope)
            ):
                yield _alias_key(alias)

    def _conflict(self, repo: Repo, delivery: Delivery) -> str | None:
        """What of `delivery` is not as it was recorded."""
        where = f"{repo}@{delivery.commit}"
        known = self._index.get(_manifest_key(repo, delivery.commit))
        is_closed = known is not None and known["has_files"]
        recorded = {tree_order(entry): entry for entry in self._list(repo, delivery.commit, "", True, "", None)}
        told = {tree_order(entry) for entry in delivery.entries}
        for entry in delivery.entries:
            there = recorded.get(tree_order(entry))
            if there is None and is_closed and not entry.is_directory:
                return f"what is to be imported has {where}:{entry.path}, which was not there when all its files were told"
            if there is not None and not there.agrees(entry):
                return f"what is to be imported says {where}:{entry.path} is {entry}; it was {there}"
        if delivery.manifest.has_files:
            lost = next((name for name, entry in recorded.items() if name not in told and not entry.is_directory), None)
            if lost is not None:
                return f"what is to be imported says that {where} has no {lost}; it had"
        return None

    async def listing(
        self, repo: Repo, commit: str, directory: str = "", *, recursive: bool, after: str = "", limit: int | None = None
    ) -> list[Entry]:
        """What is below `directory` ("" the top), in git's order, from after the entry whose tree_order is `after`."""
        return await self._index.run(self._list, repo, commit, directory, recursive, after, limit)

    def _list(self, repo: Repo, commit: str, directory: str, recursive: bool, after: str, limit: int | None) -> list[Entry]:
        root = _path_key(repo, commit, "")
        prefix = _path_key(repo, commit, f"{directory}/" if directory else "")
        position = (root + after if after else prefix) + _FIRST
        if after.endswith("/") and not recursive:
            position = root + after.removesuffix("/") + _AFTER_SLASH
        found: list[Entry] = []
        while limit is None or len(found) < limit:
            rows = self._index.scan(prefix, position, _SCAN if limit is None else min(_SCAN, limit - len(found)))
            for key, row in rows:
                path = key.removeprefix(root)
                position = key + _FIRST
                child, slash, rest = key.removeprefix(prefix).partition("/")
                if recursive or not slash:
                    found.append(entry_from_row(path.removesuffix("/"), row))
                    continue
                # Below a directory: the directory itself once, and on behind all that is in it.
                oid = str(row["oid"]) if not rest and row.get("oid") else None
                found.append(Entry(f"{directory}/{child}" if directory else child, oid=oid))
                position = prefix + child + _AFTER_SLASH
                break
            else:
                if not rows:
                    break
        return found

    # — LFS objects ———————————————————————————————————————————————————————————————————————————————

    async def objects(self, repo: Repo, oids: Iterable[str]) -> dict[str, LfsObject]:
        """Of these objects, those that the repo is known to have."""
        known = {oid: there for oid in oids if (there := self._objects.get((repo, oid))) is not None}
        unknown = [oid for oid in oids if oid not in known]
        if unknown:
            rows = await self._index.run(lambda: [(oid, self._index.get(_object_key(repo, oid))) for oid in unknown])
            for oid, row in rows:
                if row is not None:
                    known[oid] = _object_from_row(row)
                    self._objects.put((repo, oid), known[oid])
        return known

    async def note_objects(self, repo: Repo, objects: Mapping[str, LfsObject]) -> None:
        """The repo has these: for ever. A size that no file proved gives way to a later one."""
        try:
            recorded = await self._index.run(self._add_objects, repo, objects)
        except StoreFull as exc:
            log.warning("which LFS objects %s has is not kept: %s", repo, exc)
            recorded = dict(objects)
        for oid, there in recorded.items():
            self._objects.put((repo, oid), there)

    def _add_objects(self, repo: Repo, objects: Mapping[str, LfsObject]) -> dict[str, LfsObject]:
        recorded, new = {}, []
        with self._index.transaction():
            for oid, told in objects.items():
                row = self._index.get(_object_key(repo, oid))
                there = None if row is None else _object_from_row(row)
                recorded[oid] = told if there is None or there.commit is None else there
                if recorded[oid] != there:
                    new.append((_object_key(repo, oid), {"size": told.size, "commit": told.commit, "path": told.path}))
            self._index.put_many(new)
        return recorded

    def has_gathered(self, repo: Repo, commit: str) -> bool:
        """Whether gather_objects() has done its work."""
        return self._gathered.get((repo, commit)) is not None

    async def gather_objects(self, repo: Repo, commit: str) -> None:
        """Note the LFS objects among the files that are known of a commit; once in this process."""
        entries = await self.listing(repo, commit, recursive=True)
        files = {entry.blob.hex: entry for entry in entries if entry.blob is not None and entry.is_lfs}
        await self.note_objects(repo, {oid: LfsObject(entry.size, commit, entry.path) for oid, entry in files.items()})
        self._gathered.put((repo, commit), True)


def _knows_more(manifest: Manifest, known: Mapping[str, Any]) -> bool:
    return (manifest.has_files, manifest.has_tree) > (bool(known["has_files"]), bool(known["has_tree"]))


def _object_key(repo: Repo, oid: str) -> str:
    return f"lfs {repo.scope} {repo}#{oid}"


def _object_from_row(row: Mapping[str, Any]) -> LfsObject:
    return LfsObject(int(row["size"]), row["commit"], row["path"])


def _alias_key(repo: Repo) -> str:
    return f"alias {'restricted ' if repo.is_restricted else ''}{repo.kind}/{repo.name.lower()}"


def _seen_key(repo: Repo) -> str:
    return f"visible {repo}"


def _ref_key(repo: Repo, revision: str) -> str:
    return f"ref {repo.scope} {repo}@{revision}"


def _manifest_key(repo: Repo, commit: str) -> str:
    return f"{_MANIFEST}{repo.scope} {repo}@{commit}"


def _path_key(repo: Repo, commit: str, path: str) -> str:
    return f"path {repo.scope} {repo}@{commit}:{path}"
