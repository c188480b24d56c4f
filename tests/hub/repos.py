"""Repositories of the stand-in Hub: real git object ids, refs, and the rules of naming. No HTTP here."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Literal

from tests.hub.content import LFS, File, Given, file_of

Kind = Literal["models", "datasets", "spaces"]
KINDS: tuple[Kind, ...] = ("models", "datasets", "spaces")
Gate = Literal[False, "auto", "manual"]
_EPOCH = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
_SHORT_SHA = re.compile(r"[0-9a-f]{5,39}")


@dataclass(frozen=True)
class Directory:
    """A git tree object: its oid, and its direct children by name."""

    oid: str
    children: Mapping[str, File | Directory]

    @property
    def body(self) -> bytes:
        """The tree object's bytes."""
        return b"".join(_tree_line(name, child) for name, child in self.children.items())


@dataclass(frozen=True)
class Commit:
    """An immutable snapshot of a repository; its id is a real git commit id."""

    files: Mapping[str, File]
    parents: tuple[str, ...]
    title: str
    author: str
    date: datetime

    @cached_property
    def root(self) -> Directory:
        return _directory(self.files)

    @property
    def body(self) -> bytes:
        """The commit object's bytes."""
        stamp = f"{self.author} <{self.author}@example.org> {int(self.date.timestamp())} +0000"
        lines = [f"tree {self.root.oid}", *(f"parent {one}" for one in self.parents)]
        lines += [f"author {stamp}", f"committer {stamp}", "", self.title, ""]
        return "\n".join(lines).encode()

    @cached_property
    def id(self) -> str:
        return _git_sha1("commit", self.body)

    @property
    def iso_date(self) -> str:
        return self.date.strftime("%Y-%m-%dT%H:%M:%S.000Z")

    @cached_property
    def directories(self) -> Mapping[str, Directory]:
        """Every directory by path; the root is ''."""
        found: dict[str, Directory] = {}

        def visit(path: str, directory: Directory) -> None:
            found[path] = directory
            for name, child in directory.children.items():
                if isinstance(child, Directory):
                    visit(f"{path}/{name}" if path else name, child)

        visit("", self.root)
        return found


@dataclass(eq=False)
class Repo:
    """One repository. Tests change it freely while the Hub serves it."""

    id: str
    kind: Kind = "models"
    private: bool = False
    gated: Gate = False
    disabled: bool = False
    author: str = "alice"
    card: Mapping[str, object] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None
    """A git repository on disk that is served to git instead of these commits."""
    on_rename: Callable[[Repo, str], None] = field(default=lambda repo, old: None, repr=False)
    on_delete: Callable[[Repo], None] = field(default=lambda repo: None, repr=False)

    @cached_property
    def internal_id(self) -> str:
        """The database id that CDN paths and `_id` show; it survives a rename."""
        return hashlib.sha256(f"{self.kind}/{self.id}".encode()).hexdigest()[:24]

    @property
    def is_namespaced(self) -> bool:
        return "/" in self.id

    def commit(
        self,
        files: Mapping[str, Given | LFS] | None = None,
        revision: str = "main",
        *,
        delete: Iterable[str] = (),
        replace: bool = False,
        title: str = "Upload files",
    ) -> str:
        """Add files on top of `revision` and move it there; the new commit's id."""
        parent = self.commits.get(self.refs.get(_full_ref(revision), ""))
        tree = {} if replace or parent is None else dict(parent.files)
        for path in delete:
            del tree[path]
        tree.update((_checked_path(path), file_of(given)) for path, given in (files or {}).items())
        date = _EPOCH + timedelta(minutes=len(self.commits))
        made = Commit(tree, (parent.id,) if parent else (), title, self.author, date)
        self.commits[made.id] = made
        self.refs[_full_ref(revision)] = made.id
        return made.id

    def move(self, branch: str, commit: str) -> None:
        """Let a branch point at a commit."""
        self.ref(_full_ref(branch), commit)

    def tag(self, name: str, commit: str) -> None:
        self.ref(f"refs/tags/{name}", commit)

    def ref(self, name: str, commit: str) -> None:
        """Set a full ref, such as refs/pr/1 or refs/convert/parquet."""
        if commit not in self.commits:
            raise ValueError(f"{self.id} has no commit {commit}")
        self.refs[name] = commit

    def drop_ref(self, name: str) -> None:
        """Forget a branch (short name) or a full ref."""
        del self.refs[_full_ref(name)]

    def rename(self, new_id: str) -> None:
        """Move the repository; its old name redirects from now on."""
        self.internal_id  # noqa: B018  fixed by the first name
        old, self.id = self.id, new_id
        self.on_rename(self, old)

    def delete(self) -> None:
        """Remove the repository from the Hub."""
        self.on_delete(self)

    @property
    def head(self) -> Commit | None:
        return self.at("main")

    def at(self, revision: str) -> Commit | None:
        """The commit that a branch, tag, full ref, HEAD, or full or short sha names."""
        name = "main" if revision == "HEAD" else revision
        for ref in (f"refs/heads/{name}", f"refs/tags/{name}", name):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        if name in self.commits:
            return self.commits[name]
        if _SHORT_SHA.fullmatch(name):
            hits = [commit for commit in self.commits.values() if commit.id.startswith(name)]
            return hits[0] if len(hits) == 1 else None
        return None

    def history(self, commit: Commit) -> list[Commit]:
        """A commit and its ancestors, newest first."""
        line = [commit]
        while line[-1].parents:
            line.append(self.commits[line[-1].parents[0]])
        return line

    def last_change(self, commit: Commit, path: str) -> Commit:
        """The newest ancestor in which the file or directory at `path` became what it is."""

        def oid(at: Commit) -> str | None:
            directory = at.directories.get(path)
            found = at.files.get(path)
            return directory.oid if directory else found.git_oid if found else None

        last = commit
        for older in self.history(commit)[1:]:
            if oid(older) != oid(commit):
                break
            last = older
        return last


def _full_ref(revision: str) -> str:
    return revision if revision.startswith("refs/") else f"refs/heads/{revision}"


def _checked_path(path: str) -> str:
    if any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(f"not a path inside a repository: {path!r}")
    return path


def _git_sha1(kind: str, body: bytes) -> str:
    return hashlib.sha1(b"%s %d\0%s" % (kind.encode(), len(body), body), usedforsecurity=False).hexdigest()


def _directory(files: Mapping[str, File]) -> Directory:
    """Build the git tree objects bottom up."""
    below: dict[str, dict[str, File]] = {}
    children: dict[str, File | Directory] = {}
    for path, file in files.items():
        name, slash, rest = path.partition("/")
        if slash:
            below.setdefault(name, {})[rest] = file
        else:
            children[name] = file
    children.update((name, _directory(inside)) for name, inside in below.items())
    ordered = dict(sorted(children.items(), key=_git_order))
    return Directory(_git_sha1("tree", Directory("", ordered).body), ordered)


def _git_order(item: tuple[str, File | Directory]) -> bytes:
    name, child = item
    return name.encode() + (b"/" if isinstance(child, Directory) else b"")


def _tree_line(name: str, child: File | Directory) -> bytes:
    mode, oid = ("40000", child.oid) if isinstance(child, Directory) else ("100644", child.git_oid)
    return f"{mode} {name}\0".encode() + bytes.fromhex(oid)
