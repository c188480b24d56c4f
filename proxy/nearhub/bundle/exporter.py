"""Exporter: writes what the cache knows and has of some repos as a bundle. Asks nobody outside."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nearhub.bundle import format as fmt
from nearhub.bundle import signing
from nearhub.bundle.format import Bundle, Document, GitPart, Item, ItemKind, RepoRecord, Revision, Since, Status
from nearhub.bundle.lines import Lines
from nearhub.bundle.parts import PIECE, PartsWriter, read_file
from nearhub.bundle.repo_git import git_refs, packed
from nearhub.catalog import Catalog
from nearhub.digest import BlobHash
from nearhub.documents import kept_about
from nearhub.errors import BundleRefused
from nearhub.store.bares import BareId
from nearhub.store.holdings import Holdings
from nearhub.store.index import Index
from nearhub.store.log import TransparencyLog
from nearhub.tasks import uncancelled
from nearhub.wire.headers import BlobId
from nearhub.wire.manifest import tree_order
from nearhub.wire.target import DEFAULT_REVISION, Repo, Scope, is_commit

MIN_PART = 1024**2


class Exporter:
    """`upstreams`: base URLs that the documents may name. Clock: wall seconds."""

    def __init__(
        self,
        catalog: Catalog,
        index: Index,
        holdings: Holdings,
        record: TransparencyLog,
        upstreams: Sequence[str],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._catalog = catalog
        self._index = index
        self._lines = Lines(index)
        self._holdings = holdings
        self._record_of = record
        self._upstreams = tuple(upstreams)
        self._clock = clock

    async def run(
        self,
        wanted: Iterable[tuple[Repo, str]],
        to: Path,
        *,
        since: Path | None = None,
        max_part: int = 4 * 1024**3,
        with_git: bool = False,
        key: Path | None = None,
    ) -> AsyncGenerator[dict[str, Any]]:
        """Write a bundle of these repos, each at a revision, into the directory `to`. Yields {"done", "of"} in bytes, and last
        {"result": …}.

        `since`: a bundle, or its manifest, whose content is left out. A part has fewer bytes than `max_part`.
        """
        if max_part < MIN_PART:
            raise BundleRefused(f"--max-part must be {MIN_PART} bytes or more")
        secret = await asyncio.to_thread(signing.secret_from, key) if key else None
        before = await asyncio.to_thread(_before, since) if since else None
        origin, sequence = await self._lines.next_export(secrets.token_hex(16))
        if before is not None and before[1].origin != origin:
            raise BundleRefused(f"{since} was exported from another cache: a delta is made where its predecessor was")
        records, carried = await self._records(wanted, before[1] if before else None)
        blobs, missing = await self._blobs(records, carried, before[1].missing if before else frozenset())
        writer = PartsWriter(to, max_part - 1)
        await asyncio.to_thread(writer.open)
        try:
            items: list[Item] = []
            done, total = 0, sum(blobs.values())
            for blob, size in blobs.items():
                if await uncancelled(asyncio.to_thread(self._copy, blob, size, writer), writer.end):
                    items.append(Item(ItemKind.BLOB, blob.hex, size))
                else:  # evicted meanwhile
                    missing.add(blob)
                done += size
                yield {"done": done, "of": total}
            if with_git:
                records = [await self._with_git(record, before[1] if before else None, writer, items) for record in records]
            proofs = await self._proofs(records, writer, items)
            await uncancelled(asyncio.to_thread(writer.finish))
            bundle = Bundle(
                origin,
                sequence,
                round(self._clock(), 3),
                self._upstreams,
                Since(before[0], before[1].sequence) if before else None,
                tuple(records),
                tuple(carried),
                frozenset(missing),
                tuple(items),
                tuple(writer.parts),
                proofs,
            )
            text = await asyncio.to_thread(fmt.dump, bundle)
            await asyncio.to_thread(fmt.parse, text)  # what is written can be read
            told = f"{fmt.identify(text)} number {sequence} of {origin}"
            signature = signing.sign(secret, text, told) if secret else None
            await uncancelled(asyncio.to_thread(writer.seal, text, signature))
        finally:
            writer.close()
        yield {"result": _result(bundle, text, secret, to)}

    # — what goes in ———————————————————————————————————————————————————————————————————————————————

    async def _records(
        self, wanted: Iterable[tuple[Repo, str]], before: Bundle | None
    ) -> tuple[list[RepoRecord], list[tuple[Repo, str]]]:
        """A record for each repo; and (repo, commit) of the manifests that came with bundles before this one."""
        since = before.created if before else 0.0
        by_repo: dict[Repo, list[str]] = {}
        for asked, revision in wanted:
            by_repo.setdefault(await self._catalog.canonical(asked), []).append(revision or DEFAULT_REVISION)
        carried = _carried(before) if before else set()
        told_before = {repo for repo, _ in carried}
        records = [
            await self._record(repo, revisions, carried, since if repo in told_before else 0.0)
            for repo, revisions in sorted(by_repo.items(), key=_by_name)
        ]
        return records, sorted(carried, key=lambda one: (str(one[0]), one[1]))

    async def _record(self, repo: Repo, revisions: Sequence[str], carried: set[tuple[Repo, str]], since: float) -> RepoRecord:
        """`since`: wall seconds, before which documents are known there."""
        seen = await self._catalog.seen(repo)
        status = Status.RESTRICTED if seen is None else Status.GATED if seen.visibility.is_gated else Status.PUBLIC
        scope = Scope.RESTRICTED if seen is None else Scope.PUBLIC
        # Who closed a repo that was public says nothing of what was learnt then: it goes on, to those whom a policy names.
        scoped = [replace(repo, scope=one) for one in (scope, *(other for other in Scope if other is not scope))]
        if status is Status.PUBLIC:
            scoped = scoped[:1]
        refs = {name: ref for one in reversed(scoped) for name, ref in (await self._refs(one)).items()}
        commits = {}
        for revision in revisions:
            commit = revision if is_commit(revision) else refs[revision].commit if revision in refs else None
            if commit is None:
                raise BundleRefused(f"this cache does not know {repo}@{revision}: nearhub ls shows what it has")
            commits[commit] = revision
        taken = [await self._revision(scoped, commit, revision) for commit, revision in sorted(commits.items())]
        told = {str(one.commit) for one in taken}
        return RepoRecord(
            repo,
            status,
            seen.visibility.is_disabled if seen else False,
            seen.at if seen else self._clock(),
            tuple(sorted(await self._catalog.aliases(repo))),
            {name: ref for name, ref in refs.items() if ref.commit in told},
            tuple(one for one in taken if (repo, one.commit) not in carried),
            tuple([doc for one in scoped[:1] for doc in await self._documents(one) if doc.at > since]),
            None,
        )

    async def _refs(self, repo: Repo) -> dict[str, fmt.Ref]:
        found = {}
        for name in await self._catalog.refs(repo):
            ref = await self._catalog.ref(repo, name)
            if ref is not None:
                found[name] = fmt.Ref(ref.commit, ref.asked_at)
        return found

    async def _revision(self, scoped: Sequence[Repo], commit: str, revision: str) -> Revision:
        known = [(repo, manifest) for repo in scoped if (manifest := await self._catalog.manifest(repo, commit)) is not None]
        if not known:
            raise BundleRefused(f"this cache has nothing of {scoped[0]}@{revision}: nearhub ls shows what it has")
        repo, manifest = max(known, key=lambda one: (one[1].has_files, one[1].has_tree))
        entries = await self._catalog.listing(repo, commit, recursive=True)
        return Revision(
            commit,
            manifest.about,
            manifest.has_files,
            manifest.has_tree,
            manifest.is_huge,
            manifest.learnt_at,
            tuple(sorted(entries, key=tree_order)),
        )

    async def _documents(self, repo: Repo) -> list[Document]:
        kept = await self._index.run(kept_about, self._index, repo)
        return [Document(one.path, one.at, one.value, one.next_query) for one in kept]

    async def _blobs(
        self, records: Sequence[RepoRecord], carried: Iterable[tuple[Repo, str]], lacked: Iterable[BlobId]
    ) -> tuple[dict[BlobId, int], set[BlobId]]:
        """What to bring, with sizes in bytes: what the files name, less what was brought before. And what is not here."""
        brought: dict[BlobId, int] = {}
        for repo, commit in carried:
            for scope in Scope:
                listing = await self._catalog.listing(replace(repo, scope=scope), commit, recursive=True)
                brought |= {entry.blob: entry.size for entry in listing if entry.blob is not None}
        lacking = frozenset(lacked)
        wanted = {blob: size for blob, size in brought.items() if blob in lacking}
        for record in records:
            for revision in record.revisions:
                wanted |= {e.blob: e.size for e in revision.entries if e.blob is not None and e.blob not in brought}
        here = await asyncio.to_thread(lambda: {blob for blob in wanted if self._holdings.blobs.path_of(blob).exists()})
        # Small ones first: what a damaged medium costs is the large ones, and those are the fewest.
        chosen = sorted((blob for blob in wanted if blob in here), key=lambda blob: (wanted[blob], blob))
        return {blob: wanted[blob] for blob in chosen}, set(wanted) - here

    def _copy(self, blob: BlobId, size: int, writer: PartsWriter) -> bool:
        """In a thread. False: it is not here any more. What is wrong on this disk does not cross."""
        fd = self._holdings.blobs.open_complete(blob)
        if fd is None:
            return False
        try:
            if os.fstat(fd).st_size != size:
                raise BundleRefused(f"{blob} has not the size that its manifest says: nearhub verify removes wrong blobs")
            digest = BlobHash(blob, size)
            while digest.position < size:
                data = os.pread(fd, min(PIECE, size - digest.position), digest.position)
                if not data:
                    raise BundleRefused(f"{blob} became shorter while it was read")
                digest.update(data)
                writer.write(data)
        finally:
            os.close(fd)
        if not digest.matches():
            raise BundleRefused(f"{blob} is wrong on this disk: nearhub verify removes it, and it is brought anew")
        return True

    async def _proofs(
        self, records: Sequence[RepoRecord], writer: PartsWriter, items: list[Item]
    ) -> tuple[tuple[str, str], ...]:
        """That the log of this cache has what the bundle says of its revisions, as far as anything was logged."""
        about = [
            (replace(record.repo, scope=scope), revision.commit)
            for record in records
            for revision in record.revisions
            for scope in Scope
        ]
        data = await self._record_of.carried(about)
        if b"\n" not in data.rstrip(b"\n"):  # the key alone
            return ()
        await uncancelled(asyncio.to_thread(writer.write, data))
        name = hashlib.sha256(data).hexdigest()
        items.append(Item(ItemKind.PROOF, name, len(data)))
        return ((fmt.LOG, name),)

    async def _with_git(self, record: RepoRecord, before: Bundle | None, writer: PartsWriter, items: list[Item]) -> RepoRecord:
        bares = self._holdings.bares
        bare = BareId.of(record.repo)
        said = await asyncio.to_thread(bares.said, bare)
        if said is None:
            raise BundleRefused(f"this cache has no git mirror of {record.repo}: clone it from the mirror once, or leave --git")
        with bares.hold(bare) as path:
            refs, head = await git_refs(path)
            old = next((one.git for one in before.repos if one.repo == record.repo), None) if before else None
            digest, size = hashlib.sha256(), 0
            async for data in packed(path, refs, old.refs if old else {}):
                digest.update(data)
                size += len(data)
                await uncancelled(asyncio.to_thread(writer.write, data))
        item = None
        if size:
            item = digest.hexdigest()
            items.append(Item(ItemKind.GIT, item, size))
        return replace(record, git=GitPart(refs, head, said.refs, said.at, item))


def _by_name(one: tuple[Repo, Any]) -> str:
    return str(one[0])


def _before(path: Path) -> tuple[str, Bundle]:
    """Id and manifest of the bundle at `path`."""
    try:
        text = read_file(path / fmt.MANIFEST if path.is_dir() else path, fmt.MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        raise BundleRefused(f"{path}: there is no bundle here") from None
    return fmt.identify(text), fmt.parse(text)


def _carried(before: Bundle) -> set[tuple[Repo, str]]:
    return {*before.carried, *((record.repo, one.commit) for record in before.repos for one in record.revisions)}


def _result(bundle: Bundle, text: bytes, secret: signing.SecretKey | None, to: Path) -> dict[str, Any]:
    return {
        "bundle": str(to),
        "id": fmt.identify(text),
        "origin": bundle.origin,
        "sequence": bundle.sequence,
        "since": bundle.since.id if bundle.since else None,
        "signed_by": secret.public.name if secret else None,
        "repos": [
            {
                "repo": str(record.repo),
                "status": str(record.status),
                "revisions": [one.commit for one in record.revisions],
                "git": record.git is not None,
            }
            for record in bundle.repos
        ],
        "items": len(bundle.items),
        "missing": len(bundle.missing),
        "bytes": sum(part.size for part in bundle.parts) + len(text),
        "parts": len(bundle.parts),
    }
