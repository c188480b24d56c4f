"""Importer: takes a bundle into the cache. The signature first, then every hash, and only then is anything visible.

A crash at any point: blobs that were verified stay in the store and are not read again; no revision is there by half; the
bundle counts as imported when all of it is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nearhub.bundle import format as fmt
from nearhub.bundle import signing
from nearhub.bundle.format import Bundle, Item, ItemKind, RepoRecord, Revision, Status
from nearhub.bundle.intake import BATCH, BATCH_BYTES, SMALL, Intake, Room
from nearhub.bundle.lines import Lines
from nearhub.bundle.parts import PIECE, SUMS, PartsReader, read_file, sums
from nearhub.bundle.repo_git import unpack
from nearhub.catalog import Catalog, Delivery, Manifest, Ref, Seen
from nearhub.digest import BlobHash
from nearhub.documents import Kept, keep_about
from nearhub.errors import BadProof, BundleRefused, StoreFull
from nearhub.store.bares import BareId
from nearhub.store.holdings import Holdings, Import
from nearhub.store.index import Index
from nearhub.store.log import TransparencyLog
from nearhub.tasks import uncancelled
from nearhub.wire.leaves import opened
from nearhub.wire.manifest import Entry, Visibility, rewritten
from nearhub.wire.target import Repo, Scope

_SCOPES = {
    Status.PUBLIC: (Scope.PUBLIC,),
    Status.GATED: (Scope.PUBLIC, Scope.RESTRICTED),
    Status.RESTRICTED: (Scope.RESTRICTED,),
}
"""A gated repo's listing is public, and its content restricted: both are looked up apart."""
_MOST_NAMED = 20


_Batch = list[tuple[Item, int]]
"""Items, and where each begins in the bytes of the parts."""


@dataclass(frozen=True, slots=True)
class _Opened:
    """A bundle of which the manifest is believed."""

    folder: Path
    id: str
    bundle: Bundle
    signer: signing.PublicKey | None


class Importer:
    """`keys`: who may sign; none: anything is imported. `upstream`: the mirror's own, which documents are to name.

    Clock: wall seconds.
    """

    def __init__(
        self,
        catalog: Catalog,
        index: Index,
        holdings: Holdings,
        record: TransparencyLog,
        keys: Sequence[signing.PublicKey],
        upstream: str,
        room: Room | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._catalog = catalog
        self._index = index
        self._lines = Lines(index)
        self._holdings = holdings
        self._record = record
        self._keys = tuple(keys)
        self._upstream = upstream
        self._room = room
        self._clock = clock

    async def run(self, path: Path, *, allow_rollback: bool = False, check: bool = False) -> AsyncGenerator[dict[str, Any]]:
        """Import the bundle at `path`, a directory or its manifest. Yields {"done", "of"} in bytes, and last {"result": …}.

        `check`: only look whether it could be: every hash is taken, and nothing changes. Raises BundleRefused.
        """
        opened = await asyncio.to_thread(_open, path, self._keys)
        bundle = opened.bundle
        await self._refuse_early(opened, allow_rollback=allow_rollback)
        intake = Intake(self._holdings.blobs, self._room)
        reader = PartsReader(opened.folder, bundle.parts)
        with closing(intake), closing(reader):
            wanted = [
                (item, start)
                for item, start in fmt.spans(bundle)
                if check or item.kind is not ItemKind.BLOB or not intake.has(item.blob)
            ]
            problems = await asyncio.to_thread(_needed, reader, wanted)
            if problems:
                raise BundleRefused(_listed("the bundle is not whole", problems))
            done, total = 0, sum(item.size for item, _ in wanted)
            wrong: list[tuple[Item, int]] = []
            if check:
                for number in range(len(bundle.parts)):
                    problems += await uncancelled(asyncio.to_thread(reader.damaged, [number]))
                    done += bundle.parts[number].size
                    yield {"done": done, "of": total}
                if problems:
                    raise BundleRefused(_listed("the bundle is damaged", problems))
                yield {"result": self._result(opened, [], checked=True)}
                return
            async with self._room_for(opened, total) as room:
                for batch in _batches(wanted):
                    wrong += await self._take(intake, reader, batch, room)
                    done += sum(item.size for item, _ in batch)
                    yield {"done": done, "of": total}
                if wrong:
                    raise BundleRefused(await uncancelled(asyncio.to_thread(_explain, reader, wrong)))
                await uncancelled(asyncio.to_thread(self._keep_proofs, bundle, reader, wanted))
                async with self._git_files(reader, wanted) as files:
                    refused = await self._reveal(opened, files, allow_rollback=allow_rollback)
        yield {"result": self._result(opened, refused)}

    # — before any byte is read ————————————————————————————————————————————————————————————————————

    async def _refuse_early(self, opened: _Opened, *, allow_rollback: bool) -> None:
        bundle = opened.bundle
        if bundle.since is not None and not await self._lines.has(bundle.since.id):
            raise BundleRefused(
                f"the bundle only has what is new since number {bundle.since.sequence} of its line "
                f"({bundle.since.id[:12]}…), which was not imported here: import that one first"
            )
        if allow_rollback or await self._lines.has(opened.id):
            return
        for record in bundle.repos:
            newest = await self._lines.newest(bundle.origin, record.repo)
            if newest >= bundle.sequence:
                raise BundleRefused(
                    f"{record.repo} was imported from number {newest} of this line already, and the bundle is number "
                    f"{bundle.sequence}: --allow-rollback imports it all the same"
                )

    @asynccontextmanager
    async def _room_for(self, opened: _Opened, size: int):  # type: ignore[no-untyped-def]
        room = Import(opened.id)
        if self._room is None:
            yield room
            return
        try:
            if not await self._room.admit(room, size):
                raise StoreFull(f"the bundle brings {size} bytes, and there is no room for them: raise --max-size, or purge")
            yield room
        finally:
            await self._room.settle(room)

    # — content ————————————————————————————————————————————————————————————————————————————————————

    async def _take(self, intake: Intake, reader: PartsReader, batch: _Batch, room: Import) -> _Batch:
        """Bring one large blob, or many small ones. Returns those that are not what they are called."""
        item, start = batch[0]
        if item.kind is ItemKind.PROOF:
            is_right = await uncancelled(asyncio.to_thread(_is_right, reader, item, start))
            return [] if is_right else batch
        if item.size > SMALL:

            def read(position: int, most: int) -> bytes:
                return reader.read(start + position, most)

            return [] if await intake.take(item.blob, item.size, read, room) else batch
        bodies = await uncancelled(
            asyncio.to_thread(lambda: {item.blob: reader.read_all(start, item.size) for item, start in batch})
        )
        wrong = await intake.take_small(bodies, room)
        return [(item, start) for item, start in batch if item.blob in wrong]

    def _keep_proofs(self, bundle: Bundle, reader: PartsReader, wanted: _Batch) -> None:
        """Check what the exporting cache's log proves, and that the bundle says the same. Blocks. Raises BundleRefused."""
        known = {(str(record.repo), revision.commit): revision for record in bundle.repos for revision in record.revisions}
        for item, start in wanted:
            if item.kind is not ItemKind.PROOF:
                continue
            if item.size > fmt.MAX_PROOF_BYTES:
                raise BundleRefused(f"the bundle's proofs have {item.size} bytes, {fmt.MAX_PROOF_BYTES} are allowed")
            try:
                proofs = self._record.keep_foreign(reader.read_all(start, item.size))
            except BadProof as exc:
                raise BundleRefused(f"the bundle's proofs do not hold: {exc.message}") from exc
            for leaf, _ in (opened(proof.extra) for proof in proofs):
                revision = known.get((leaf.repo, leaf.commit))
                told = {} if revision is None else {one.path: (one.blob, one.size) for one in revision.entries}
                for path, named in leaf.files.items():
                    if revision is not None and told.get(path) != (named.blob, named.size):
                        raise BundleRefused(
                            f"{leaf.repo}@{leaf.commit}:{path} is not in the bundle as the exporting log has it"
                        )

    @asynccontextmanager
    async def _git_files(self, reader: PartsReader, wanted: Sequence[tuple[Item, int]]):  # type: ignore[no-untyped-def]
        """Verified files of the items that git is to read, by their hash; gone afterwards."""
        files: dict[str, Path] = {}
        disk = self._holdings.blobs.disk
        try:
            for item, start in wanted:
                if item.kind is ItemKind.GIT:
                    path, is_right = await uncancelled(asyncio.to_thread(self._git_file, reader, item, start))
                    files[item.name] = path
                    if not is_right:
                        raise BundleRefused(await uncancelled(asyncio.to_thread(_explain, reader, [(item, start)])))
            yield files
        finally:
            for path in files.values():
                await asyncio.to_thread(disk.unlink, path)

    def _git_file(self, reader: PartsReader, item: Item, start: int) -> tuple[Path, bool]:
        store = self._holdings.blobs
        digest = BlobHash(item.blob, item.size)
        with store.incoming(f"git-{item.name}") as incoming:
            while digest.position < item.size:
                data = reader.read(start + digest.position, min(PIECE, item.size - digest.position))
                store.disk.write_at(incoming.fd, [data], digest.position)
                digest.update(data)
            kept = incoming.path.with_suffix(".bundle")
            store.disk.rename(incoming.path, kept)
        return kept, digest.matches()

    # — what becomes visible ———————————————————————————————————————————————————————————————————————

    async def _reveal(self, opened: _Opened, files: dict[str, Path], *, allow_rollback: bool) -> list[dict[str, str]]:
        """All content is verified. Returns what of the bundle contradicts the record, revision by revision."""
        bundle = opened.bundle
        refused: list[dict[str, str]] = []
        brought: list[Repo] = []
        for record in bundle.repos:
            reasons = [
                reason
                for revision in record.revisions
                if (reason := await self._deliver(bundle, record, revision, allow_rollback)) is not None
            ]
            refused += [{"repo": str(record.repo), "why": reason} for reason in reasons]
            if reasons:
                continue
            await self._deliver_carried(bundle, record, allow_rollback)
            for scope in _SCOPES[record.status]:
                repo = replace(record.repo, scope=scope)
                kept = [Kept(one.path, one.at, self._here(bundle, one.value), one.next_query) for one in record.documents]
                await self._index.run(keep_about, self._index, repo, kept)
            if record.git is not None:
                file = files.get(record.git.item) if record.git.item else None
                await unpack(self._holdings.bares, BareId.of(record.repo), record.git, file)
            brought.append(record.repo)
        if not refused:
            signer = opened.signer.name if opened.signer else None
            await self._lines.note(opened.id, bundle, brought, self._clock(), signer)
        return refused

    async def _deliver(self, bundle: Bundle, record: RepoRecord, revision: Revision, may_go_back: bool) -> str | None:
        manifest = Manifest(
            self._here(bundle, revision.about),
            revision.has_files,
            revision.has_tree,
            revision.is_huge,
            self._past(revision.learnt_at),
            sum(not entry.is_directory for entry in revision.entries),
        )
        refs = {name: ref for name, ref in record.refs.items() if ref.commit == revision.commit}
        delivery = self._delivery(record, revision.commit, manifest, revision.entries, self._dated(refs))
        return await self._catalog.deliver(delivery, _SCOPES[record.status], may_go_back=may_go_back)

    async def _deliver_carried(self, bundle: Bundle, record: RepoRecord, may_go_back: bool) -> None:
        """What the bundle tells anew of manifests that came before: refs, and who may see them. Raises BundleRefused."""
        told = {revision.commit for revision in record.revisions}
        refs = {name: ref for name, ref in record.refs.items() if ref.commit not in told}
        carried = {commit for repo, commit in bundle.carried if repo == record.repo}
        if any(ref.commit not in carried for ref in refs.values()):
            raise BundleRefused(f"{fmt.MANIFEST}: a ref of {record.repo} is at a commit that no bundle brought")
        for commit in sorted(carried - told):
            at = self._dated({name: ref for name, ref in refs.items() if ref.commit == commit})
            known = await self._known(record.repo, commit)
            if known is None and at:
                raise BundleRefused(
                    f"{record.repo}@{commit} came with an earlier bundle, and is not here any more: import that one again"
                )
            if known is not None:  # else it was purged here, and nobody asks for it
                delivery = self._delivery(record, commit, *known, at)
                await self._catalog.deliver(delivery, _SCOPES[record.status], may_go_back=may_go_back)

    async def _known(self, repo: Repo, commit: str) -> tuple[Manifest, tuple[Entry, ...]] | None:
        """In whichever scope it came: a repo may have been opened or closed since."""
        for scope in Scope:
            scoped = replace(repo, scope=scope)
            manifest = await self._catalog.manifest(scoped, commit)
            if manifest is not None:
                return manifest, tuple(await self._catalog.listing(scoped, commit, recursive=True))
        return None

    def _delivery(
        self, record: RepoRecord, commit: str, manifest: Manifest, entries: tuple[Entry, ...], refs: dict[str, Ref]
    ) -> Delivery:
        at = self._past(record.seen_at)
        is_closed = record.status is Status.RESTRICTED
        seen = None if is_closed else Seen(Visibility(record.status is Status.GATED, record.is_disabled), at)
        closed_at = at if is_closed else None
        return Delivery(record.repo, commit, manifest, entries, refs, seen, closed_at, record.aliases)

    def _dated(self, refs: dict[str, fmt.Ref]) -> dict[str, Ref]:
        return {name: Ref(ref.commit, self._past(ref.asked_at)) for name, ref in refs.items()}

    def _past(self, at: float) -> float:
        """Two clocks differ: nothing was learnt later than now."""
        return min(at, self._clock())

    def _here(self, bundle: Bundle, document: Any) -> Any:
        """With the URLs of the exporting mirror's upstreams turned into those of this one's."""
        bases = [base for base in bundle.upstreams if base != self._upstream]
        return rewritten(document, bases, self._upstream) if bases else document

    def _result(self, opened: _Opened, refused: list[dict[str, str]], *, checked: bool = False) -> dict[str, Any]:
        bundle = opened.bundle
        return {
            "id": opened.id,
            "origin": bundle.origin,
            "sequence": bundle.sequence,
            "signed_by": opened.signer.name if opened.signer else None,
            "checked_only": checked,
            "repos": [
                {
                    "repo": str(record.repo),
                    "status": str(record.status),
                    "revisions": [one.commit for one in record.revisions],
                    "refs": sorted(record.refs),
                }
                for record in bundle.repos
            ],
            "items": len(bundle.items),
            "bytes": sum(item.size for item in bundle.items),
            "missing": len(bundle.missing),
            "refused": refused,
        }


def _open(path: Path, keys: Sequence[signing.PublicKey]) -> _Opened:
    """In this order: signature, sums, form."""
    folder = path if path.is_dir() else path.parent
    manifest = path / fmt.MANIFEST if path.is_dir() else path
    try:
        text = read_file(manifest, fmt.MAX_MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise BundleRefused(f"{path}: there is no bundle here (no {fmt.MANIFEST}: the export may not have ended)") from None
    signature = None
    with suppress(FileNotFoundError):
        signature = read_file(folder / fmt.SIGNATURE, 4096)
    signer = None
    if keys:
        if signature is None:
            raise BundleRefused("the bundle is not signed, and [import] trusted_keys lets only signed ones in")
        signer = signing.verify(keys, text, signature)
    try:
        there = read_file(folder / SUMS, fmt.MAX_PARTS * 100)
    except FileNotFoundError:
        raise BundleRefused(f"{SUMS} is missing") from None
    if there.split(b"\n", 1)[0] != sums(text, None, []).rstrip(b"\n"):
        raise BundleRefused(f"{fmt.MANIFEST} or {SUMS} is damaged: the one is not what the other says")
    bundle = fmt.parse(text)
    if there != sums(text, signature, bundle.parts):
        raise BundleRefused(f"{fmt.SIGNATURE} or {SUMS} is damaged: the one is not what the other says")
    return _Opened(folder, fmt.identify(text), bundle, signer)


def _is_right(reader: PartsReader, item: Item, start: int) -> bool:
    digest = BlobHash(item.blob, item.size)
    while digest.position < item.size:
        digest.update(reader.read(start + digest.position, min(PIECE, item.size - digest.position)))
    return digest.matches()


def _batches(wanted: _Batch) -> Iterator[_Batch]:
    """All but git's, which are read again when they are wanted: small blobs together, the rest one by one."""
    batch: _Batch = []
    size = 0
    for item, start in wanted:
        if item.kind is ItemKind.GIT:
            continue
        if item.kind is ItemKind.PROOF or item.size > SMALL:
            yield [(item, start)]
            continue
        batch.append((item, start))
        size += item.size
        if len(batch) == BATCH or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _needed(reader: PartsReader, wanted: Sequence[tuple[Item, int]]) -> list[str]:
    numbers = {number for item, start in wanted for number in reader.touched(start, item.size)}
    return reader.problems(sorted(numbers))


def _explain(reader: PartsReader, wrong: Sequence[tuple[Item, int]]) -> str:
    """Which parts have to be brought again; or, where those are as they were written, which items never were right."""
    numbers = sorted({number for item, start in wrong for number in reader.touched(start, item.size)})
    if problems := reader.damaged(numbers):
        return _listed("the bundle is damaged", problems)
    return _listed("the bundle was made wrong: not what it is called", [f"{item.kind} {item.name}" for item, _ in wrong])


def _listed(what: str, problems: Sequence[str]) -> str:
    more = f", and {len(problems) - _MOST_NAMED} more" if len(problems) > _MOST_NAMED else ""
    return f"{what}: {', '.join(problems[:_MOST_NAMED])}{more}"
