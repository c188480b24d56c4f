"""What an operator asks of a cache: ls, du, purge, verify, stats, why. Of a running mirror, or of a directory nobody serves.

Everything returns what JSON can hold. Nothing here asks upstream.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from nearhub.access import PUBLIC_TTL_S
from nearhub.bundle.carriage import Carriage
from nearhub.catalog import Catalog
from nearhub.connectivity import Mode
from nearhub.digest import BlobHash
from nearhub.errors import BadTarget, ClientError, NearhubError
from nearhub.fill import FillEngine
from nearhub.follower import Follower
from nearhub.metrics import Metrics
from nearhub.pins import ALL, Pin, Pins
from nearhub.prefetch import Prefetcher, Wanted
from nearhub.store.bares import BareId
from nearhub.store.holdings import Holding, Holdings
from nearhub.store.log import TransparencyLog
from nearhub.upstream.dispatch import Dispatcher
from nearhub.wire.freshness import decide
from nearhub.wire.headers import BlobId
from nearhub.wire.leaves import opened
from nearhub.wire.target import (
    DEFAULT_REVISION,
    FileTarget,
    GitTarget,
    LfsCall,
    LfsTarget,
    PageTarget,
    RawTarget,
    Repo,
    RepoCall,
    RepoKind,
    Scope,
    is_commit,
    parse,
    parse_repo_name,
    split_prefix,
)


@dataclass(frozen=True, slots=True)
class Live:
    """What only a running mirror has. `began_at`: monotonic seconds. `past` finds an answered request by its id."""

    fills: FillEngine
    dispatcher: Dispatcher
    metrics: Metrics
    past: Callable[[str], dict[str, Any] | None]
    prefetcher: Prefetcher
    follower: Follower
    began_at: float = field(default_factory=time.monotonic)


class Operations:
    """`remove` forgets a blob or a bare mirror unless it is busy, and says whether it did."""

    def __init__(
        self,
        catalog: Catalog,
        holdings: Holdings,
        remove: Callable[[Holding], Awaitable[bool]],
        pins: Pins,
        record: TransparencyLog,
        *,
        ref_ttl_s: float,
        prefix: str = "",
        live: Live | None = None,
        carriage: Carriage | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._catalog = catalog
        self._holdings = holdings
        self._store = holdings.blobs
        self._remove = remove
        self._pins = pins
        self._record = record
        self._ref_ttl_s = ref_ttl_s
        self._prefix = prefix
        self._live = live
        self._carriage = carriage
        self._clock = clock

    # — what is there ——————————————————————————————————————————————————————————————————————————————

    async def ls(self, repo: str = "") -> list[dict[str, Any]]:
        """A row for each commit of each repo (or of one): files and bytes, known and cached; when one was last used."""
        rows = []
        pinned = await self._pinned_manifests()
        known = await self._catalog.manifests()
        if repo:
            names = await self._names(parse_repo(repo))
            known = [(name, commit) for name in names for _, commit in await self._catalog.manifests(name)]
        for name, commit in known:
            blobs = await self._blobs_of(name, commit)
            held = await asyncio.to_thread(self._complete, list(blobs))
            refs = await self._catalog.refs(name)
            rows.append(
                {
                    "repo": str(name),
                    "commit": commit,
                    "revisions": sorted(ref for ref, at in refs.items() if at == commit),
                    "files": len(blobs),
                    "bytes": sum(blobs.values()),
                    "cached_files": len(held),
                    "cached_bytes": sum(blobs[blob] for blob in held),
                    "used_at": max(held.values(), default=None),
                    "pins": pinned.get((name, commit), []),
                }
            )
        return rows

    async def _pinned_manifests(self) -> dict[tuple[Repo, str], list[str]]:
        """(repo, commit) → the pins that keep it."""
        found: dict[tuple[Repo, str], list[str]] = {}
        for pin in self._pins.all:
            for kept in await self._pins.commits(pin):
                found.setdefault(kept, []).append(str(pin))
        return found

    async def _blobs_of(self, repo: Repo, commit: str) -> dict[BlobId, int]:
        listing = await self._catalog.listing(repo, commit, recursive=True)
        return {entry.blob: entry.size for entry in listing if entry.blob is not None}

    def _complete(self, blobs: Sequence[BlobId]) -> dict[BlobId, float]:
        """Of `blobs`, the complete ones, and when each was last used, in wall seconds."""
        found = {}
        for blob in blobs:
            with contextlib.suppress(FileNotFoundError):
                found[blob] = self._store.path_of(blob).stat().st_atime
        return found

    async def du(self) -> dict[str, Any]:
        """Bytes on disk, by what they are, and of each repo: those that it has alone, and those it shares."""
        owners: dict[BlobId, set[str]] = {}
        for repo, commit in await self._catalog.manifests():
            for blob in await self._blobs_of(repo, commit):
                owners.setdefault(blob, set()).add(str(repo))
        return await asyncio.to_thread(self._du, owners)

    def _du(self, owners: dict[BlobId, set[str]]) -> dict[str, Any]:
        totals = {"complete": 0, "partial": 0, "quarantine": 0, "unlisted": 0, "git": 0, "sites": 0, "pinned": 0}
        pinned = self._pins.holdings()
        repos: dict[str, dict[str, int]] = {}

        def row_of(name: str) -> dict[str, int]:
            return repos.setdefault(name, {"own": 0, "shared": 0, "git": 0, "pinned": 0})

        count = 0
        for blob in {blob for blob, _, _ in self._store.scan()}:
            held = self._store.held(blob)
            is_complete = self._store.path_of(blob).exists()
            totals["complete" if is_complete else "partial"] += held.bytes
            totals["quarantine"] += held.aside
            count += is_complete
            names = owners.get(blob, set())
            is_pinned = blob in pinned
            totals["pinned"] += held.bytes * is_pinned
            if not names:
                totals["unlisted"] += held.bytes
            for name in names:
                row_of(name)["own" if len(names) == 1 else "shared"] += held.bytes
                row_of(name)["pinned"] += held.bytes * is_pinned
        totals["sites"] = sum(size for _, size, _ in self._holdings.sites.scan())
        for bare, size, _ in self._holdings.bares.scan():
            totals["git"] += size
            row_of(bare.shown())["git"] += size
            totals["pinned"] += size * (bare in pinned)
            row_of(bare.shown())["pinned"] += size * (bare in pinned)
        index = sum(entry.stat().st_size for entry in os.scandir(self._store.root / "index") if entry.is_file())
        listed = [{"repo": name, **row} for name, row in sorted(repos.items())]
        return {"blobs": count, "bytes": totals | {"index": index}, "repos": listed}

    async def stats(self) -> dict[str, Any]:
        """Counters of the running mirror."""
        if self._live is None:
            return {"running": False}
        live = self._live
        samples: dict[str, Any] = {}
        for family in live.metrics.registry.collect():
            for sample in family.samples:
                if not sample.name.endswith("_created"):
                    labels = ",".join(f"{key}={value}" for key, value in sample.labels.items())
                    samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return {
            "running": True,
            "offline": live.dispatcher.connectivity.why,
            "seconds": round(time.monotonic() - live.began_at, 1),
            "counters": samples,
            "fills": [repr(fill) for fill in live.fills.running],
            "followed": await live.follower.report(),
            "upstreams": live.dispatcher.report(),
        }

    # — what is done ———————————————————————————————————————————————————————————————————————————————

    async def purge(
        self, repo: str = "", revision: str = "", blob: str = "", *, dry_run: bool = False, force: bool = False
    ) -> dict[str, Any]:
        """Remove a repo, one revision of it, or one blob by its hash. Content that other repos have too stays.

        With a whole repo goes its git mirror; `NAME.git` is a mirror of another host. What is pinned is refused, but by
        `force`: with it go the pins that are about nothing else.
        """
        if blob:
            try:
                blobs = [BlobId.from_etag(blob.lower())]
            except ValueError as exc:
                raise BadTarget(str(exc)) from None
            if blobs[0] in self._pins.holdings() and not force:
                raise BadTarget(
                    f"{blobs[0]} is pinned: nearhub pin --list shows by what; --force removes it, and the pin stays"
                )
            return await self._drop(blobs, [], dry_run=dry_run)
        if repo.endswith(".git"):
            return await self._drop(self._bares(BareId.named(repo.removesuffix(".git")), repo), [], dry_run=dry_run)
        names = await self._names(parse_repo(repo))
        refs = {name: await self._catalog.refs(name) for name in names}
        chosen: list[tuple[Repo, str]] = []
        for name in names:
            commit = revision if is_commit(revision) else refs[name].get(revision, "")
            chosen += [(name, at) for _, at in await self._catalog.manifests(name) if not revision or at == commit]
        if not chosen:
            what = f"{repo}@{revision}" if revision else repo
            raise BadTarget(f"this cache has nothing of {what}: nearhub ls shows what it has")
        await self._lift(revision, chosen, dry_run=dry_run, force=force)
        gone: set[BlobId] = set()
        for name, at in chosen:
            gone |= set(await self._blobs_of(name, at))
        shared: set[BlobId] = set()
        for other, at in await self._catalog.manifests():
            if (other, at) not in chosen:
                shared |= gone & set(await self._blobs_of(other, at))
        if not dry_run:
            for name in names:
                commits = [at for one, at in chosen if one == name]
                gone_refs = [ref for ref, at in refs[name].items() if at in commits]
                await self._catalog.forget(name, commits, gone_refs, whole=not revision)
        bares = [] if revision else sorted({BareId.of(name) for name in names})
        return await self._drop([*sorted(gone - shared), *bares], sorted(shared), dry_run=dry_run)

    async def _names(self, asked: Repo) -> list[Repo]:
        """What is known of a repo in each scope, under the name that upstream has for it."""
        return [await self._catalog.canonical(replace(asked, scope=scope)) for scope in Scope]

    async def _lift(self, revision: str, chosen: Sequence[tuple[Repo, str]], *, dry_run: bool, force: bool) -> None:
        """Raises BadTarget for what is pinned; by force, lifts the pins that go with it."""
        by_manifest = await self._pinned_manifests()
        named = sorted({pin for manifest in chosen for pin in by_manifest.get(manifest, ())})
        if not named or dry_run:
            return
        if not force:
            raise BadTarget(f"pinned: {', '.join(named)}: nearhub unpin lifts it first, or --force removes both")
        repos = {replace(repo, scope=Scope.PUBLIC) for repo, _ in chosen}
        revisions = {revision, *(commit for _, commit in chosen)}
        mine = [pin for pin in self._pins.all if pin.repo in repos]
        await self._pins.drop(pin for pin in mine if not revision or pin.revision in revisions)

    async def prefetch(
        self,
        repo: str,
        revision: str = "",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        *,
        with_git: bool = False,
        rate: float | None = None,
    ) -> AsyncGenerator[dict[str, Any]]:
        """Bring a repo at a revision. Yields lines of progress, and last {"result": …}."""
        if self._live is None:
            raise BadTarget("what brings files is not here: this is no mirror")
        wanted = Wanted(parse_repo(repo), revision or DEFAULT_REVISION, tuple(include), tuple(exclude), with_git)
        async with aclosing(self._live.prefetcher.run(wanted, rate)) as lines:
            async for line in lines:
                yield line

    # — pins ———————————————————————————————————————————————————————————————————————————————————————

    async def pin(self, repo: str, revision: str = ALL, *, last: int = 1, group: str = "") -> list[dict[str, Any]]:
        """Keep a repo, or a revision of it, or the last commits of a branch. Returns its row."""
        return [await self._pin_row(await self._pins.pin(parse_repo(repo), revision, last=last, group=group))]

    async def unpin(self, repo: str = "", revision: str = ALL, *, group: str = "") -> list[dict[str, Any]]:
        """Lift one pin, or all of a group. Returns the rows of those that were."""
        gone = await self._pins.unpin(parse_repo(repo) if repo else None, revision, group=group)
        return [await self._pin_row(pin) for pin in gone]

    async def pins(self) -> list[dict[str, Any]]:
        """A row for each pin: what it keeps, and how much of that is here."""
        return [await self._pin_row(pin) for pin in sorted(self._pins.all, key=str)]

    async def _pin_row(self, pin: Pin) -> dict[str, Any]:
        blobs: dict[BlobId, int] = {}
        commits = await self._pins.commits(pin)
        for repo, commit in commits:
            blobs |= await self._blobs_of(repo, commit)
        held = await asyncio.to_thread(self._complete, list(blobs))
        return {
            "repo": str(pin.repo),
            "revision": pin.revision,
            "last": pin.last,
            "group": pin.group,
            "commits": [commit for _, commit in commits],
            "was_public": pin.was_public,
            "bytes": sum(blobs.values()),
            "cached_bytes": sum(blobs[blob] for blob in held),
            "at": pin.at,
        }

    def _bares(self, bare: BareId, asked: str) -> list[BareId]:
        if not self._holdings.bares.path_of(bare).is_dir():
            raise BadTarget(f"this cache has no git mirror {asked}: nearhub du shows what it has")
        return [bare]

    async def _drop(self, chosen: Sequence[Holding], shared: Sequence[BlobId], *, dry_run: bool) -> dict[str, Any]:
        removed = freed = busy = 0
        for blob in chosen:
            held = await asyncio.to_thread(self._holdings.held, blob)
            if not held.bytes and not held.aside:
                continue
            if dry_run or await self._remove(blob):
                removed += 1
                freed += held.bytes + held.aside
            else:
                busy += 1
        return {"removed": removed, "bytes": freed, "shared": len(shared), "busy": busy, "dry_run": dry_run}

    async def verify(self) -> AsyncIterator[dict[str, Any]]:
        """Read every complete blob and hash it. A wrong one is removed, so that the next request brings it anew.

        Yields {"done": bytes, "of": bytes} as it goes, and a last {"blobs", "bytes", "bad": [names]}.
        """
        sizes = await asyncio.to_thread(self._sizes)
        total, done, bad = sum(sizes.values()), 0, []
        for blob in sizes:
            if not await asyncio.to_thread(self._is_right, blob):
                bad.append(str(blob))
                await asyncio.to_thread(self._store.record_mismatch, blob, [])
                await self._remove(blob)
            done += sizes[blob]
            yield {"done": done, "of": total}
        yield {"blobs": len(sizes), "bytes": total, "bad": bad}

    def _sizes(self) -> dict[BlobId, int]:
        """Of the complete blobs, in bytes."""
        found = {}
        for blob in sorted({blob for blob, _, _ in self._store.scan()}):
            with contextlib.suppress(FileNotFoundError):
                found[blob] = self._store.path_of(blob).stat().st_size
        return found

    def _is_right(self, blob: BlobId) -> bool:
        try:
            fd = os.open(self._store.path_of(blob), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # evicted meanwhile
            return True
        try:
            size = os.fstat(fd).st_size
            digest = BlobHash(blob, size)
            digest.read(fd, size)
            return digest.matches()
        except (OSError, NearhubError):
            return False
        finally:
            os.close(fd)

    async def offline(self, mode: str = "") -> dict[str, Any]:
        """Whether the running mirror is offline, after switching it to `mode`: on, off or auto; "": as it is."""
        if self._live is None:
            raise BadTarget("no mirror runs on this cache: start it with --offline, or set [upstream] offline = true")
        connectivity = self._live.dispatcher.connectivity
        if mode:
            connectivity.switch(Mode(mode))
        return {"mode": str(connectivity.mode), "offline": connectivity.is_offline, "why": connectivity.why}

    # — provenance —————————————————————————————————————————————————————————————————————————————————

    async def prove(self, repo: str, revision: str = "", path: str = "") -> dict[str, Any]:
        """That what a repo has at a revision (or one path of it) is in the log: {"key", "proofs": [{"leaf", "proof"}]}."""
        name = await self._catalog.canonical(parse_repo(repo))
        at = revision or DEFAULT_REVISION
        for scoped in (name, replace(name, scope=Scope.RESTRICTED)):
            ref = None if is_commit(at) else await self._catalog.ref(scoped, at)
            commit = at if is_commit(at) else ref.commit if ref else None
            proofs = await self._record.proofs(scoped, commit, path or None) if commit else []
            if proofs:
                told = [(opened(proof.extra)[0], str(proof)) for proof in proofs]
                rows = [{"leaf": json.loads(leaf.encode()), "proof": proof} for leaf, proof in told]
                return {"key": str(self._record.key), "proofs": rows}
        what = f"{path} of {name}@{at}" if path else f"{name}@{at}"
        raise BadTarget(
            f"the log has nothing about {what}: only what was heard of since the log began; nearhub ls shows what is here"
        )

    # — across an air gap ——————————————————————————————————————————————————————————————————————————

    async def carry(self, verb: str, asked: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """export, import, import-hf-cache: yields {"done", "of"} in bytes, and last {"result": …}."""
        if self._carriage is None:
            raise BadTarget(f"{verb} cannot be done here")
        async with contextlib.aclosing(self._carriage.perform(verb, asked)) as lines:
            async for line in lines:
                yield line

    # — why ————————————————————————————————————————————————————————————————————————————————————————

    async def why(self, what: str) -> dict[str, Any]:
        """How a URL would be answered now, or a request (by its id) was. Asks nobody and changes nothing."""
        if self._live is not None and (past := self._live.past(what)) is not None:
            return past
        path = what.partition("://")[2] if "://" in what else what
        if "://" in what:
            path = path[path.find("/") :] if "/" in path else "/"
        if not path.startswith("/"):
            raise BadTarget(f"{what!r} is neither a URL nor the id of a request that this mirror remembers")
        lines: list[str] = []
        if self._live is not None and (offline := self._live.dispatcher.connectivity.why):
            lines.append(f"this mirror is offline: {offline}; whatever follows, upstream is not asked")
        try:
            await self._explain(split_prefix(path, self._prefix), lines)
        except ClientError as exc:
            lines.append(f"refused: {exc.http_status} {exc.message}")
        return {"url": what, "why": lines}

    async def _explain(self, path: str, lines: list[str]) -> None:
        target = parse(path)
        if isinstance(target, RawTarget):
            target = target.file
        if isinstance(target, FileTarget):
            lines.append(f"a file: {target.path} of {target.repo.kind} {target.repo.name} at {target.revision}")
        elif isinstance(target, RepoCall):
            lines.append(f"the API: {target.verb} of {target.repo.kind} {target.repo.name} at {target.revision}")
        elif isinstance(target, PageTarget):
            lines.append(
                f"a page about {target.path or 'the top'} of {target.repo.kind} {target.repo.name} at {target.revision}"
            )
        elif isinstance(target, GitTarget | LfsCall | LfsTarget):
            await self._explain_git(target, lines)
            return
        else:
            lines.append("the API, of no repo: upstream's own answer is kept for a minute")
            return
        repo = await self._explain_access(target.repo, lines)
        commit = await self._explain_ref(repo, target.revision, lines)
        if commit is not None:
            blob = await self._explain_manifest(repo, commit, target, lines)
            if blob is not None:
                await self._explain_blob(*blob, lines)
        if self._live is not None:
            lines += [f"upstream {row['url']}: {row['state']}" for row in self._live.dispatcher.report()]

    async def _explain_git(self, target: GitTarget | LfsCall | LfsTarget, lines: list[str]) -> None:
        repo = target.repo
        if isinstance(target, LfsTarget):
            lines.append(f"an LFS object of {repo}, for who has a link signed by this mirror")
            await self._explain_access(repo, lines)
            await self._explain_blob(BlobId.from_etag(target.oid), None, lines)
            return
        lines.append(f"git-lfs asks for objects of {repo}" if isinstance(target, LfsCall) else f"git asks for {repo}")
        bares = self._holdings.bares
        named = BareId.named(repo.name)
        if bares.said(named) is None:
            named = BareId.of(await self._explain_access(repo, lines))
        said = await asyncio.to_thread(bares.said, named)
        if said is None:
            lines.append("git: no mirror of it yet: upstream is asked, and everything fetched")
        else:
            age_s = self._clock() - said.at
            decision = decide(age_s=age_s, ttl_s=self._ref_ttl_s, grace_s=self._ref_ttl_s)
            size = (await asyncio.to_thread(bares.held, named)).bytes
            lines.append(
                f"git: {size:,} bytes in {bares.path_of(named)}; upstream was asked {age_s:.0f} s ago: {decision.value}"
            )

    async def _explain_access(self, asked: Repo, lines: list[str]) -> Repo:
        repo = await self._catalog.canonical(asked)
        if repo != asked:
            lines.append(f"name: upstream calls it {repo.name}")
        seen = await self._catalog.seen(repo)
        if seen is None:
            lines.append("access: never seen in public, or closed since: upstream is asked first, with nobody's token")
        else:
            age_s = self._clock() - seen.at
            gated = ", gated: its files are refused" if seen.visibility.is_gated else ""
            fresh = "believed" if 0 <= age_s < PUBLIC_TTL_S else "upstream is asked again; if it does not answer, served"
            lines.append(f"access: seen in public {age_s:.0f} s ago{gated}; {fresh}")
        return repo

    async def _explain_ref(self, repo: Repo, revision: str, lines: list[str]) -> str | None:
        if is_commit(revision):
            lines.append("revision: a commit, which never changes")
            return revision
        ref = await self._catalog.ref(repo, revision)
        if ref is None:
            lines.append(f"revision: what {revision} is, is not known: upstream is asked")
            return None
        age_s = self._clock() - ref.asked_at
        decision = decide(age_s=age_s, ttl_s=self._ref_ttl_s, grace_s=self._ref_ttl_s)
        lines.append(f"revision: {revision} was {ref.commit} {age_s:.0f} s ago (TTL {self._ref_ttl_s:.0f} s): {decision.value}")
        return ref.commit

    async def _explain_manifest(
        self, repo: Repo, commit: str, target: FileTarget | RepoCall | PageTarget, lines: list[str]
    ) -> tuple[BlobId, int] | None:
        manifest = await self._catalog.manifest(repo, commit)
        if manifest is None:
            lines.append("manifest: none of this commit: upstream is asked, once")
        else:
            learnt = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.learnt_at))
            known = "too many files to list: path by path" if manifest.is_huge else "part of its files"
            known = "all its files" if manifest.has_files else known
            lines.append(f"manifest: learnt {learnt}, {known}{', and its tree' if manifest.has_tree else ''}")
        if not isinstance(target, FileTarget):
            return None
        entry = await self._catalog.entry(repo, commit, target.path)
        if entry is None or entry.blob is None:
            certain = manifest is not None and manifest.has_files
            lines.append("file: not in the manifest: 404" if certain else "file: not known: upstream is asked")
            return None
        lines.append(f"file: {entry.blob}, {entry.size:,} bytes")
        return entry.blob, entry.size

    async def _explain_blob(self, blob: BlobId, size: int | None, lines: list[str]) -> None:
        held = await asyncio.to_thread(self._store.held, blob)
        mismatch = self._store.mismatch(blob)
        if mismatch is not None:
            times = "once" if mismatch.count == 1 else f"{mismatch.count} times"
            lines.append(f"verification: failed {times} in the last 24 h; resumed downloads start over")
        if await asyncio.to_thread(self._store.path_of(blob).exists):
            lines.append(f"content: complete, in {self._store.path_of(blob)}")
            return
        part = (
            f"{held.bytes:,} of {'?' if size is None else f'{size:,}'} bytes are here"
            if held.bytes
            else "nothing of it is here"
        )
        running = next((repr(fill) for fill in self._live.fills.running if fill.blob == blob), None) if self._live else None
        lines.append(f"content: {part}; " + (f"a fill is under way: {running}" if running else "a fill brings the rest"))


def parse_repo(text: str) -> Repo:
    """`owner/name`, `datasets/owner/name`, `spaces/owner/name`. Raises RepoNotFound."""
    repo = Repo.from_text(text.strip("/").removeprefix("models/"))
    return parse_repo_name(RepoKind(repo.kind), repo.name)
