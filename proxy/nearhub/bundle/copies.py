"""CopyImporter: what others downloaded, taken into the cache: huggingface_hub's cache directory, and clones of a Hub's repos.

A copy proves what its bytes are, and nothing of who may see them: unless upstream says, or the operator (`is_public`), a repo
from a copy is restricted, and had by those whom a policy names.
"""

from __future__ import annotations

import asyncio
import os
import re
import stat
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nearhub.bundle.clone import Clone, read_clone
from nearhub.bundle.intake import Intake, Room
from nearhub.catalog import Catalog, Delivery, Manifest, Ref, Seen
from nearhub.errors import BundleRefused, NearhubError, RevisionNotFound, StoreFull
from nearhub.resolve import Resolver
from nearhub.store.disk import Disk
from nearhub.store.holdings import Holdings, Import
from nearhub.wire.headers import BlobId
from nearhub.wire.manifest import Entry, Visibility, is_path, tree_order
from nearhub.wire.target import Repo, RepoKind, Scope, is_commit, parse_repo_name

_KINDS = {"models": RepoKind.MODELS, "datasets": RepoKind.DATASETS, "spaces": RepoKind.SPACES}
_REVISION = re.compile(r"[^\x00-\x20\x7f~^:?*\[\\]{1,250}\Z")
_US = "import"
"""As whom upstream is asked."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A revision in a copy. `files`: where the bytes of each blob are. `is_whole`: all files of the commit are listed."""

    commit: str
    entries: tuple[Entry, ...]
    refs: tuple[str, ...]
    is_whole: bool = False


@dataclass(slots=True)
class Copied:
    """A repo in a copy. `left`: what cannot be taken, and why."""

    repo: Repo
    snapshots: list[Snapshot] = field(default_factory=list)
    files: dict[BlobId, Path] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    read_at: float = 0.0


class CopyImporter:
    """`resolver` None: upstream is not asked. Clock: wall seconds."""

    def __init__(
        self,
        catalog: Catalog,
        holdings: Holdings,
        room: Room | None,
        resolver: Resolver | None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._catalog = catalog
        self._holdings = holdings
        self._room = room
        self._resolver = resolver
        self._clock = clock

    async def hf_cache(self, folder: Path, *, is_public: bool) -> AsyncGenerator[dict[str, Any]]:
        """All repos of a cache of huggingface_hub. Yields {"done", "of"} in bytes, and last {"result": …}."""
        copies = await asyncio.to_thread(lambda: list(read_hf_cache(folder)))
        if not copies:
            raise BundleRefused(f"{folder}: there is no models--… or datasets--… here: it is no cache of huggingface_hub")
        async for line in self._take(copies, is_public=is_public):
            yield line

    async def clone(self, folder: Path, repo: Repo | None, *, is_public: bool) -> AsyncGenerator[dict[str, Any]]:
        """A clone of a Hub's repo, at the commit that is checked out. `repo`: which; None: as its remote says."""
        clone = await read_clone(folder, repo)
        async for line in self._take([_of_clone(clone)], is_public=is_public, small=clone.small):
            yield line

    async def _take(
        self, copies: Sequence[Copied], *, is_public: bool, small: Mapping[BlobId, bytes] | None = None
    ) -> AsyncGenerator[dict[str, Any]]:
        intake = Intake(self._holdings.blobs, self._room)
        small = small or {}
        with closing(intake):
            sizes = await asyncio.to_thread(_sizes, copies, small, intake)
            done, total = 0, sum(sizes.values())
            room = Import(f"copy-{os.urandom(8).hex()}")
            rows = []
            try:
                if self._room is not None and not await self._room.admit(room, total):
                    raise StoreFull(f"this brings {total} bytes, and there is no room for them: raise --max-size, or purge")
                for copied in copies:
                    wrong: set[BlobId] = set()
                    for blob in [blob for blob in copied.files if blob in sizes]:
                        if await self._take_file(intake, blob, copied.files[blob], room):
                            done += sizes.pop(blob)
                        else:  # another repo may have it right
                            wrong.add(blob)
                        yield {"done": done, "of": total}
                    wrong |= await intake.take_small({blob: small[blob] for blob in small if blob in sizes}, room)
                    rows.append(await self._reveal(copied, wrong, is_public=is_public))
            finally:
                if self._room is not None:
                    await self._room.settle(room)
        yield {"result": {"repos": rows, "bytes": total, "bad": sum(row["wrong"] for row in rows)}}

    async def _take_file(self, intake: Intake, blob: BlobId, path: Path, room: Import) -> bool:
        try:
            fd = await asyncio.to_thread(Disk().open_read, path)
        except (OSError, NearhubError):
            return False
        try:
            return await intake.clone(blob, fd, room)
        finally:
            os.close(fd)

    async def _reveal(self, copied: Copied, wrong: set[BlobId], *, is_public: bool) -> dict[str, Any]:
        refused: list[str] = []
        commits: list[str] = []
        at = min(copied.read_at, self._clock())
        checked = True
        for snapshot in copied.snapshots:
            entries = tuple(entry for entry in snapshot.entries if entry.blob is None or entry.blob not in wrong)
            try:
                checked = await self._ask_upstream(copied.repo, snapshot.commit) and checked
            except RevisionNotFound as exc:
                refused.append(f"{snapshot.commit}: upstream knows no such commit: {exc.message}")
                continue
            seen = await self._catalog.seen(copied.repo)
            if seen is None and is_public:
                seen = Seen(Visibility(), at)
            scopes = [Scope.RESTRICTED] if seen is None else [Scope.PUBLIC]
            if seen is not None and seen.visibility.is_gated:
                scopes = list(Scope)
            whole = snapshot.is_whole and len(entries) == len(snapshot.entries)
            # What is not whole counts as nothing, so that upstream's answer, once there is one, is asked for in full.
            count = sum(not entry.is_directory for entry in entries) if whole else 0
            about = _about(copied.repo, is_public=seen is not None)
            manifest = Manifest(about, whole, whole, learnt_at=at, count=count)
            refs = {name: Ref(snapshot.commit, at) for name in snapshot.refs}
            delivery = Delivery(copied.repo, snapshot.commit, manifest, entries, refs, seen)
            reason = await self._catalog.deliver(delivery, scopes)
            if reason is None:
                commits.append(snapshot.commit)
            else:
                refused.append(reason)
        seen = await self._catalog.seen(copied.repo)
        return {
            "repo": str(copied.repo),
            "status": "restricted" if seen is None else "gated" if seen.visibility.is_gated else "public",
            "commits": commits,
            "checked_upstream": checked and bool(copied.snapshots),
            "wrong": len(wrong),
            "left": copied.left,
            "refused": refused,
        }

    async def _ask_upstream(self, repo: Repo, commit: str) -> bool:
        """Whether upstream told what the commit holds: it is recorded then, and what a copy says is checked against it.

        Raises RevisionNotFound.
        """
        if self._resolver is None:
            return False
        try:
            await self._resolver.refresh(repo, commit, _US)
        except RevisionNotFound:
            raise
        except NearhubError:
            return False
        return True


def read_hf_cache(folder: Path) -> Iterator[Copied]:
    """Raises BundleRefused where `folder` cannot be read.

    The layout, and not huggingface_hub's scan_cache_dir, is what is read: the mirror does not have that package, and of a
    damaged repo it tells one sentence and no file. A snapshot's file is a link to its blob, which is named by the etag; where
    the cache could not make links there is nothing to check a file against, and it is left.
    """
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as exc:
        raise BundleRefused(f"{folder} cannot be read: {exc.strerror}") from exc
    for name in names:
        kind, _, rest = name.partition("--")
        if kind not in _KINDS or not rest:
            continue
        try:
            repo = parse_repo_name(_KINDS[kind], rest.replace("--", "/", 1))
        except NearhubError:
            continue
        yield _read_repo(repo, folder / name)


def _read_repo(repo: Repo, folder: Path) -> Copied:
    copied = Copied(repo, read_at=_mtime(folder / "refs"))
    refs = _read_refs(folder / "refs", copied)
    for path in _listed(folder / "snapshots"):
        if not is_commit(path.name) or path.is_symlink():
            copied.left.append(f"{path.name}: no commit")
            continue
        entries = sorted(_read_snapshot(path, (folder / "blobs").resolve(), copied), key=tree_order)
        if entries:
            named = tuple(name for name, commit in refs.items() if commit == path.name)
            copied.snapshots.append(Snapshot(path.name, tuple(entries), named))
    return copied


def _read_refs(folder: Path, copied: Copied) -> dict[str, str]:
    found = {}
    for directory, _, names in os.walk(folder):
        for name in names:
            path = Path(directory, name)
            revision = str(path.relative_to(folder))
            with suppress(OSError, UnicodeDecodeError):
                commit = path.read_text(encoding="ascii").strip() if path.stat().st_size <= 64 else ""
                if is_commit(commit) and _REVISION.match(revision) and not path.is_symlink():
                    found[revision] = commit
                    continue
            copied.left.append(f"refs/{revision}: cannot be used")
    return found


def _read_snapshot(folder: Path, blobs: Path, copied: Copied) -> Iterator[Entry]:
    for directory, _, names in os.walk(folder):  # links to directories are not followed
        for name in names:
            path = Path(directory, name)
            relative = str(path.relative_to(folder))
            where = f"{folder.name[:8]}/{relative}"
            target = Path(directory, path.readlink()) if path.is_symlink() else None
            if target is None or target.parent.resolve() != blobs or not is_path(relative):
                copied.left.append(f"{where}: no link to a blob, so that nothing tells whether it is right")
                continue
            try:
                blob = BlobId.from_etag(target.name)
                info = target.lstat()
            except (ValueError, OSError):
                copied.left.append(f"{where}: its blob has no hash as its name, or is not there")
                continue
            if not stat.S_ISREG(info.st_mode):
                copied.left.append(f"{where}: its blob is no regular file")
                continue
            copied.files[blob] = blobs / target.name
            yield Entry(relative, info.st_size, None if blob.algo == "sha256" else blob.hex, blob)


def _of_clone(clone: Clone) -> Copied:
    snapshot = Snapshot(clone.commit, clone.entries, clone.refs, is_whole=True)
    return Copied(clone.repo, [snapshot], dict(clone.files), list(clone.left), clone.read_at)


def _sizes(copies: Sequence[Copied], small: Mapping[BlobId, bytes], intake: Intake) -> dict[BlobId, int]:
    """Of the blobs to bring, in bytes."""
    sizes = {blob: len(data) for blob, data in small.items() if not intake.has(blob)}
    for copied in copies:
        for blob, path in copied.files.items():
            with suppress(OSError):
                if not intake.has(blob):
                    sizes[blob] = path.lstat().st_size
    return sizes


def _reader(data: bytes) -> Callable[[int, int], bytes]:
    return lambda position, most: data[position : position + most]


def _about(repo: Repo, *, is_public: bool) -> dict[str, Any]:
    """What is known of a repo that only a copy tells of."""
    about: dict[str, Any] = {"id": repo.name, "private": not is_public, "gated": False, "disabled": False, "tags": []}
    return about | ({"modelId": repo.name} if repo.kind is RepoKind.MODELS else {})


def _listed(folder: Path) -> list[Path]:
    with suppress(OSError):
        return sorted(folder.iterdir())
    return []


def _mtime(path: Path) -> float:
    """When the newest ref was written; 0 where there is none: anything known is newer."""
    times = [0.0]
    for directory, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):
                times.append(Path(directory, name).lstat().st_mtime)
    return max(times)
