"""The Hub's JSON about repos ↔ Entry and RepoInfo: what one path is at one commit, and what a repo says of itself. Pure.

Xet is hidden: `xetHash` is never read, so it can never be sent on (clients would skip HEAD and ask a CAS that is not here).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nearhub.errors import NearhubError, UpstreamFailed
from nearhub.wire.headers import Algo, BlobId
from nearhub.wire.target import MAX_PATH_BYTES, Repo, RepoKind, is_commit, parse_repo_name

SIBLINGS_TRUSTED = 1000
"""From this many files on, the Hub's `siblings` may be cut short without a word."""
_HIDDEN = ("xetHash", "xetEnabled")
_PER_COMMIT = ("siblings", *_HIDDEN)
_UNNAMEABLE = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]")
"""Control characters, the backslash, and half a surrogate pair, which JSON can hold and UTF-8 cannot."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One path at one commit. `oid` is git's: of the blob (for LFS: of the pointer) or of the tree; None if not told.

    A file's `size` is in bytes; a directory has none. `blob` None: a directory.
    """

    path: str
    size: int = 0
    oid: str | None = None
    blob: BlobId | None = None
    pointer_size: int | None = None

    @property
    def is_directory(self) -> bool:
        return self.blob is None

    @property
    def is_lfs(self) -> bool:
        return self.blob is not None and self.blob.algo is Algo.SHA256

    def agrees(self, other: Entry) -> bool:
        """Whether both speak of the same content (P11). One may know more of how git names it."""
        same_oid = self.oid is None or other.oid is None or self.oid == other.oid
        return (self.path, self.size, self.blob) == (other.path, other.size, other.blob) and same_oid


@dataclass(frozen=True, slots=True)
class Visibility:
    """What an anonymous question upstream told of a repo. A Hub that gates says so in the same answer."""

    is_gated: bool = False
    is_disabled: bool = False


@dataclass(frozen=True, slots=True)
class RepoInfo:
    """An answer to `/api/{kind}/{repo}/revision/{revision}`. `about`: the document without its files.

    `entries` None: it did not list files with their sizes. `is_complete` False: there may be more. `source`: who answered.
    """

    repo: Repo
    commit: str
    visibility: Visibility
    about: dict[str, Any]
    entries: tuple[Entry, ...] | None
    is_complete: bool
    source: str = ""


def read_info(kind: RepoKind, document: object) -> RepoInfo:
    """Raises UpstreamFailed where the document is not what a Hub says of a repo."""
    if not isinstance(document, dict):
        raise UpstreamFailed("upstream's answer about a repo is no JSON object")
    commit, name = document.get("sha"), document.get("id")
    if not isinstance(commit, str) or not is_commit(commit):
        raise UpstreamFailed("upstream's answer about a repo names no commit")
    if not isinstance(name, str):
        raise UpstreamFailed("upstream's answer about a repo has no id")
    try:
        repo = parse_repo_name(kind, name)
    except NearhubError as exc:
        raise UpstreamFailed(f"upstream names a repo {name[:100]!r}, which is no repo id") from exc
    siblings = document.get("siblings")
    entries = _read_siblings(siblings)
    # As many as upstream listed, whether or not all of them can be named: it is its list that may be cut short.
    is_complete = entries is not None and isinstance(siblings, list) and len(siblings) < SIBLINGS_TRUSTED
    about = {key: value for key, value in document.items() if key not in _PER_COMMIT}
    visibility = Visibility(bool(document.get("gated")), bool(document.get("disabled")))
    return RepoInfo(repo, commit, visibility, about, entries, is_complete)


def _read_siblings(siblings: object) -> tuple[Entry, ...] | None:
    """None when there is no list, or one without sizes (`blobs=true` was not honoured)."""
    if not isinstance(siblings, list):
        return None
    entries = []
    for sibling in siblings:
        size = sibling.get("size") if isinstance(sibling, dict) else None
        if not isinstance(size, int):
            return None
        lfs = _mapping(sibling.get("lfs"))
        entries.append(_file_entry(sibling.get("rfilename"), size, sibling.get("blobId"), lfs.get("sha256"), lfs))
    return tuple(entry for entry in entries if entry is not None)


def read_tree(document: object) -> tuple[Entry, ...]:
    """A page of `tree`, or an answer to `paths-info`. Raises UpstreamFailed."""
    if not isinstance(document, list):
        raise UpstreamFailed("upstream's answer about a tree is no JSON list")
    entries = []
    for item in document:
        if not isinstance(item, dict):
            raise UpstreamFailed("upstream's answer about a tree holds something else than entries")
        if item.get("type") == "directory":
            if is_path(item.get("path")):
                entries.append(Entry(item["path"], oid=_oid(item.get("oid"))))
            continue
        lfs = _mapping(item.get("lfs"))
        entry = _file_entry(item.get("path"), item.get("size"), item.get("oid"), lfs.get("oid") or lfs.get("sha256"), lfs)
        if entry is not None:
            entries.append(entry)
    return tuple(entries)


def _file_entry(path: object, size: object, oid: object, sha256: object, lfs: Mapping[str, Any]) -> Entry | None:
    """None for a path that no URL can name."""
    if not is_path(path):
        return None
    git_oid = _oid(oid)
    try:
        blob = BlobId.from_etag(sha256 if isinstance(sha256, str) else git_oid or "")
        if isinstance(sha256, str) and blob.algo is not Algo.SHA256:
            raise ValueError(f"{sha256!r} is no sha256")
    except ValueError as exc:
        raise UpstreamFailed(f"upstream's listing names no content for {str(path)[:100]!r}: {exc}") from None
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**60:
        raise UpstreamFailed(f"upstream's listing has no size for {str(path)[:100]!r}")
    pointer_size = lfs.get("pointerSize") if blob.algo is Algo.SHA256 else None
    return Entry(str(path), size, git_oid, blob, pointer_size if isinstance(pointer_size, int) else None)


def is_path(path: object) -> bool:
    """Whether `path` can be asked for: what parse() refuses in URLs is not listed either."""
    if not isinstance(path, str) or _UNNAMEABLE.search(path) or len(path.encode()) > MAX_PATH_BYTES:
        return False
    return all(part not in ("", ".", "..") for part in path.split("/"))


def _mapping(value: object) -> Mapping[str, Any]:
    """`value` if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def _oid(value: object) -> str | None:
    return value if isinstance(value, str) and is_commit(value) else None


# — rows of the index ————————————————————————————————————————————————————————————————————————————


def entry_row(entry: Entry) -> dict[str, Any]:
    if entry.blob is None:
        return {"dir": 1, "oid": entry.oid}
    row: dict[str, Any] = {"etag": entry.blob.hex, "size": entry.size}
    if entry.is_lfs:
        row |= {"oid": entry.oid, "pointer": entry.pointer_size}
    return row


def entry_from_row(path: str, row: Mapping[str, Any]) -> Entry:
    if "dir" in row:
        return Entry(path, oid=row["oid"])
    blob = BlobId.from_etag(row["etag"])
    return Entry(path, int(row["size"]), row.get("oid", blob.hex), blob, row.get("pointer"))


# — what clients are sent ————————————————————————————————————————————————————————————————————————


def sibling(entry: Entry, *, with_blobs: bool) -> dict[str, Any]:
    """One file of `siblings`. Here an LFS file's hash is called `sha256`; in trees, `oid`."""
    told: dict[str, Any] = {"rfilename": entry.path}
    if with_blobs:
        told |= {"size": entry.size, "blobId": git_oid(entry)}
        if entry.blob is not None and entry.is_lfs:
            told["lfs"] = {"sha256": entry.blob.hex, "size": entry.size, "pointerSize": _pointer_size(entry)}
    return told


def tree_item(entry: Entry) -> dict[str, Any]:
    """One item of `tree` and `paths-info`."""
    if entry.blob is None:
        return {"type": "directory", "oid": entry.oid, "size": 0, "path": entry.path}
    item: dict[str, Any] = {"type": "file", "oid": git_oid(entry), "size": entry.size, "path": entry.path}
    if entry.is_lfs:
        item["lfs"] = {"oid": entry.blob.hex, "size": entry.size, "pointerSize": _pointer_size(entry)}
    return item


def pointer(entry: Entry) -> bytes:
    """What git stores for an LFS file; https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md."""
    assert entry.blob is not None
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{entry.blob.hex}\nsize {entry.size}\n".encode()


def _pointer_size(entry: Entry) -> int:
    return entry.pointer_size if entry.pointer_size is not None else len(pointer(entry))


def git_oid(entry: Entry) -> str | None:
    """git's name of a file; for an LFS file of which it was not told, that of the pointer which the specification gives."""
    if entry.oid is not None or entry.blob is None:
        return entry.oid
    if not entry.is_lfs:
        return entry.blob.hex
    data = pointer(entry)
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def with_directories(files: Iterable[Entry]) -> list[Entry]:
    """`files` and the directories they are in, in git's order: for a repo whose tree upstream cannot be asked for any more.

    A directory's oid is what git makes of these files when none of them is executable or a link.
    """
    files = tuple(files)
    content: dict[str, list[Entry]] = {"": []}
    for entry in files:
        path = entry.path
        content.setdefault(path.rpartition("/")[0], []).append(entry)
        while path := path.rpartition("/")[0]:
            content.setdefault(path.rpartition("/")[0], [])
            content.setdefault(path, [])
    found: list[Entry] = []
    for path in sorted(content, key=lambda path: -path.count("/") if path else 1):
        if path:
            directory = Entry(path, oid=_tree_oid(content[path]))
            content[path.rpartition("/")[0]].append(directory)
            found.append(directory)
    return sorted([*found, *files], key=tree_order)


def below(entries: Iterable[Entry], directory: str, *, recursive: bool) -> list[Entry]:
    """Of `entries`, what is in `directory` ("" the top), or anywhere below it; or the file of that name itself."""
    prefix = f"{directory}/" if directory else ""
    inside = [entry for entry in entries if entry.path.startswith(prefix)]
    if not inside and directory:
        return [entry for entry in entries if entry.path == directory]
    return [entry for entry in inside if recursive or "/" not in entry.path[len(prefix) :]]


def tree_order(entry: Entry) -> str:
    """git's order: a directory sorts as if its name ended in a slash."""
    return f"{entry.path}/" if entry.is_directory else entry.path


def _tree_oid(entries: Sequence[Entry]) -> str:
    def line(entry: Entry) -> bytes:
        mode = b"40000" if entry.is_directory else b"100644"
        return b"%s %s\0" % (mode, entry.path.rpartition("/")[2].encode()) + bytes.fromhex(git_oid(entry) or "")

    data = b"".join(line(entry) for entry in sorted(entries, key=lambda e: tree_order(e).encode()))
    return hashlib.sha1(b"tree %d\0" % len(data) + data).hexdigest()


def rewritten(document: Any, bases: Sequence[str], base: str) -> Any:
    """`document` with every URL of an upstream (`bases`) turned into the mirror's (`base`), and Xet hidden."""
    match document:
        case str():
            for theirs in bases:
                if document == theirs or document.startswith((f"{theirs}/", f"{theirs}?")):
                    return base + document[len(theirs) :]
            return document
        case list():
            return [rewritten(item, bases, base) for item in document]
        case dict():
            return {key: rewritten(value, bases, base) for key, value in document.items() if key not in _HIDDEN}
        case _:
            return document
