"""Repositories of the stand-in as bare git repositories on disk, for git itself to serve. No HTTP here.

Objects are written loose and as a stream when a commit first brings them: a file of gigabytes costs some MiB of memory.
All refs are one packed-refs file: branches and tags that move, in whichever direction, or go, do so in one rename.
"""

from __future__ import annotations

import asyncio
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from tests.hub.content import Memory, Source, pieces
from tests.hub.repos import Commit, Directory, Repo

_CONFIG = "[core]\n\trepositoryformatversion = 0\n\tfilemode = true\n\tbare = true\n"
_COMPRESSION = 0  # of what tests write, the large is random


class Bare:
    """One repository on disk, and how far it has followed its Repo."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = asyncio.Lock()
        self._commits: set[str] = set()
        self._refs: dict[str, str] | None = None

    async def follow(self, repo: Repo) -> None:
        """Write what the Repo has now and this has not; cancelling does not stop it in the middle."""
        await asyncio.shield(self._follow(repo))

    async def settle(self) -> None:
        """Wait until nobody writes here."""
        async with self._lock:
            return

    async def _follow(self, repo: Repo) -> None:
        async with self._lock:
            commits, refs = dict(repo.commits), dict(repo.refs)
            if refs != self._refs or commits.keys() != self._commits:
                await asyncio.to_thread(self._write, commits, refs)
                self._commits, self._refs = set(commits), refs

    def _write(self, commits: Mapping[str, Commit], refs: Mapping[str, str]) -> None:
        if self._refs is None:
            (self.folder / "refs").mkdir(parents=True, exist_ok=True)
            (self.folder / "config").write_text(_CONFIG)
            (self.folder / "HEAD").write_text("ref: refs/heads/main\n")
        for commit in commits.values():
            if commit.id not in self._commits:
                self._write_tree(commit.root)
                self._write_object("commit", commit.id, Memory(commit.body))
        lines = ["# pack-refs with: peeled fully-peeled sorted", *(f"{refs[name]} {name}" for name in sorted(refs)), ""]
        changed = self.folder / "packed-refs.new"
        changed.write_text("\n".join(lines))
        changed.replace(self.folder / "packed-refs")
        for gone in self._commits - commits.keys():
            self._path(gone).unlink()

    def _write_tree(self, tree: Directory) -> None:
        """A tree comes after all that is in it: one that is there is complete."""
        if self._path(tree.oid).exists():
            return
        for child in tree.children.values():
            if isinstance(child, Directory):
                self._write_tree(child)
            else:
                self._write_object("blob", child.git_oid, child.stored)
        self._write_object("tree", tree.oid, Memory(tree.body))

    def _write_object(self, kind: str, oid: str, source: Source) -> None:
        path = self._path(oid)
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        packer = zlib.compressobj(_COMPRESSION)
        part = path.with_suffix(".part")
        with part.open("wb") as handle:
            handle.write(packer.compress(f"{kind} {source.size}\0".encode()))
            for piece in pieces(source):
                handle.write(packer.compress(piece))
            handle.write(packer.flush())
        part.rename(path)

    def _path(self, oid: str) -> Path:
        return self.folder / "objects" / oid[:2] / oid[2:]


class Shelf:
    """The bare repositories of one Hub, in a temporary directory that is made when git first asks."""

    def __init__(self) -> None:
        self._bares: dict[Repo, Bare] = {}
        self._home: tempfile.TemporaryDirectory[str] | None = None

    async def folder(self, repo: Repo) -> Path:
        """Where git finds this repository as it is now."""
        if repo.folder is not None:
            return repo.folder
        if self._home is None:
            self._home = tempfile.TemporaryDirectory(prefix="hub-git-", ignore_cleanup_errors=True)
        if repo not in self._bares:
            self._bares[repo] = Bare(Path(self._home.name) / f"{len(self._bares)}.git")
        await self._bares[repo].follow(repo)
        return self._bares[repo].folder

    async def clear(self) -> None:
        """Remove everything; what is asked for later is written anew."""
        bares, self._bares = list(self._bares.values()), {}
        home, self._home = self._home, None
        for bare in bares:
            await bare.settle()
        if home is not None:
            await asyncio.to_thread(home.cleanup)
