"""What a bundle says of itself: its manifest file, text ↔ Bundle. Pure; nothing here opens a file.

A bundle is a directory: `bundle.json`, `bundle.json.minisig` where it is signed, `SHA256SUMS`, and `part-0001.bin`,
`part-0002.bin` …, which are the bytes of all items one after the other, cut anywhere. Nothing is compressed, so that nothing
can be larger than it says; no name in it ever becomes a file name; what is there is covered by a hash in the manifest, and
the manifest by SHA256SUMS and the signature.

The text is canonical (ASCII, no white space, keys in one order): what parse() takes is exactly what dump() gives, and the
sha256 of these bytes is the bundle's id.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from nearhub.errors import BundleRefused, NearhubError
from nearhub.wire.headers import BlobId
from nearhub.wire.manifest import Entry, entry_from_row, entry_row, is_path, tree_order
from nearhub.wire.target import MAX_PATH_BYTES, Repo, is_commit, parse_repo_name

T = TypeVar("T")

FORMAT = 1
MANIFEST, SIGNATURE = "bundle.json", "bundle.json.minisig"
PART = "part-{:04d}.bin"
MAX_MANIFEST_BYTES = 256 * 1024**2
MAX_REPOS = 10_000
MAX_REFS = 200_000
"""Of a repo, of both kinds: the API's and git's."""
MAX_ITEMS = 2_000_000
MAX_PARTS = 9_999
MAX_SIZE = 2**60
_HEX64 = re.compile(r"[0-9a-f]{64}\Z", re.ASCII)
_ORIGIN = re.compile(r"[0-9a-f]{32}\Z", re.ASCII)
_REVISION = re.compile(r"[^\x00-\x20\x7f~^:?*\[\\]{1,250}\Z")
_GIT_REF = re.compile(r"refs/[^\x00-\x20\x7f~^:?*\[\\]{1,250}\Z")
_DOCUMENT = re.compile(r"[!-~]{1,4096}( [0-9a-f]{64})?\Z", re.ASCII)


class Status(StrEnum):
    """Who could see a repo when it was captured; the mirror that imports it holds to that."""

    PUBLIC = "public"
    GATED = "gated"
    RESTRICTED = "restricted"


LOG = "log"
"""What proofs of the exporting cache's transparency log are of."""
MAX_PROOF_BYTES = 256 * 1024**2


class ItemKind(StrEnum):
    BLOB = "blob"
    GIT = "git"
    """What `git bundle create` wrote."""
    PROOF = "proof"
    """Of the transparency log; checked on import, and not read."""


@dataclass(frozen=True, slots=True)
class Item:
    """Bytes in the parts. `name`: of a blob its etag, of everything else the sha256."""

    kind: ItemKind
    name: str
    size: int

    @property
    def blob(self) -> BlobId:
        """What its bytes are checked against."""
        return BlobId.from_etag(self.name)


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Ref:
    """What a movable revision was when upstream was asked, in wall-clock seconds."""

    commit: str
    asked_at: float


@dataclass(frozen=True, slots=True)
class Revision:
    """A manifest of a repo at a commit: see catalog.Manifest. `scan`: a verdict of a scanner, if there was one."""

    commit: str
    about: dict[str, Any]
    has_files: bool
    has_tree: bool
    is_huge: bool
    learnt_at: float
    entries: tuple[Entry, ...]
    scan: str | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """What upstream said in its own words. `path` as documents.py keys it."""

    path: str
    at: float
    value: Any
    next_query: str | None


@dataclass(frozen=True, slots=True)
class GitPart:
    """A repo's git: all refs, the branch that HEAD is, what upstream's refs were (a digest) and when. `item`: its sha256 among
    the items; None: no object is new since the bundle before."""

    refs: Mapping[str, str]
    head: str | None
    digest: str
    asked_at: float
    item: str | None


@dataclass(frozen=True, slots=True)
class RepoRecord:
    """`seen_at`: when it was last seen as `status` says, wall seconds. `aliases`: other names that it was asked for by."""

    repo: Repo
    status: Status
    is_disabled: bool
    seen_at: float
    aliases: tuple[str, ...]
    refs: Mapping[str, Ref]
    revisions: tuple[Revision, ...]
    documents: tuple[Document, ...]
    git: GitPart | None


@dataclass(frozen=True, slots=True)
class Since:
    """The bundle before this one."""

    id: str
    sequence: int


@dataclass(frozen=True, slots=True)
class Bundle:
    """`origin`: the cache that it was exported from, which counts its bundles by `sequence`. `created`: wall seconds.

    `carried`: (repo, commit) of the manifests that bundles before this one brought. `missing`: blobs that were not in the
    exporting cache, of these and of those. `proofs`: what a proof is of, in words of the transparency log, and its item.
    """

    origin: str
    sequence: int
    created: float
    upstreams: tuple[str, ...]
    since: Since | None
    repos: tuple[RepoRecord, ...]
    carried: tuple[tuple[Repo, str], ...]
    missing: frozenset[BlobId]
    items: tuple[Item, ...]
    parts: tuple[Part, ...]
    proofs: tuple[tuple[str, str], ...] = ()


def identify(text: bytes) -> str:
    """A bundle's id."""
    return hashlib.sha256(text).hexdigest()


# — to text ————————————————————————————————————————————————————————————————————————————————————————


def dump(bundle: Bundle) -> bytes:
    document = {
        "nearhub_bundle": FORMAT,
        "origin": bundle.origin,
        "sequence": bundle.sequence,
        "created": bundle.created,
        "upstreams": list(bundle.upstreams),
        "since": {"id": bundle.since.id, "sequence": bundle.since.sequence} if bundle.since else None,
        "repos": [_dump_repo(record) for record in bundle.repos],
        "carried": [[str(repo), commit] for repo, commit in bundle.carried],
        "missing": sorted(blob.hex for blob in bundle.missing),
        "items": [[item.kind, item.name, item.size] for item in bundle.items],
        "parts": [[part.name, part.size, part.sha256] for part in bundle.parts],
        "proofs": [[about, item] for about, item in bundle.proofs],
    }
    return _canonical(document)


def _canonical(document: Any) -> bytes:
    try:
        return json.dumps(document, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    except ValueError as exc:
        raise BundleRefused(f"what upstream said cannot be written down: {exc}") from exc


def _dump_repo(record: RepoRecord) -> dict[str, Any]:
    git = record.git
    return {
        "repo": str(record.repo),
        "status": record.status,
        "disabled": record.is_disabled,
        "seen_at": record.seen_at,
        "aliases": list(record.aliases),
        "refs": {name: [ref.commit, ref.asked_at] for name, ref in record.refs.items()},
        "revisions": [_dump_revision(revision) for revision in record.revisions],
        "documents": [[one.path, one.at, one.value, one.next_query] for one in record.documents],
        "git": None
        if git is None
        else {"refs": dict(git.refs), "head": git.head, "digest": git.digest, "asked_at": git.asked_at, "item": git.item},
    }


def _dump_revision(revision: Revision) -> dict[str, Any]:
    return {
        "commit": revision.commit,
        "about": revision.about,
        "has_files": revision.has_files,
        "has_tree": revision.has_tree,
        "is_huge": revision.is_huge,
        "learnt_at": revision.learnt_at,
        "entries": [[tree_order(entry), entry_row(entry)] for entry in revision.entries],
        "scan": revision.scan,
    }


# — from text ——————————————————————————————————————————————————————————————————————————————————————


def parse(text: bytes) -> Bundle:
    """Raises BundleRefused for all that dump() does not write."""
    if len(text) > MAX_MANIFEST_BYTES:
        raise BundleRefused(f"{MANIFEST} has {len(text)} bytes, {MAX_MANIFEST_BYTES} are allowed")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise BundleRefused(f"{MANIFEST} is damaged: it is no JSON") from None
    if not isinstance(document, dict) or type(document.get("nearhub_bundle")) is not int:
        raise BundleRefused(f"{MANIFEST} is no manifest of a bundle")
    if document["nearhub_bundle"] != FORMAT:
        raise BundleRefused(f"the bundle has format {document['nearhub_bundle']}, this nearhub knows {FORMAT}: upgrade")
    try:
        bundle = _read(document)
        is_canonical = dump(bundle) == text
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as exc:
        raise BundleRefused(f"{MANIFEST} is damaged or made up: {type(exc).__name__}: {str(exc)[:200]}") from None
    if not is_canonical:
        raise BundleRefused(f"{MANIFEST} is damaged or made up: it is not written as nearhub writes it")
    _check(bundle)
    return bundle


def _read(document: dict[str, Any]) -> Bundle:
    since = document["since"]
    return Bundle(
        _matching(document["origin"], _ORIGIN, "origin"),
        _count(document["sequence"]),
        _time(document["created"]),
        tuple(_url(url) for url in _list(document["upstreams"], 100)),
        None if since is None else Since(_matching(since["id"], _HEX64, "bundle id"), _count(since["sequence"])),
        tuple(_read_repo(record) for record in _list(document["repos"], MAX_REPOS)),
        tuple((_repo(name), _commit(commit)) for name, commit in _list(document["carried"], MAX_ITEMS)),
        frozenset(BlobId.from_etag(_text(etag)) for etag in _list(document["missing"], MAX_ITEMS)),
        tuple(_read_item(*item) for item in _list(document["items"], MAX_ITEMS)),
        tuple(_read_part(*part) for part in _list(document["parts"], MAX_PARTS)),
        tuple((_text(about), _matching(item, _HEX64, "item")) for about, item in _list(document["proofs"], MAX_ITEMS)),
    )


def _read_repo(record: dict[str, Any]) -> RepoRecord:
    git = record["git"]
    return RepoRecord(
        _repo(record["repo"]),
        Status(record["status"]),
        _flag(record["disabled"]),
        _time(record["seen_at"]),
        tuple(parse_repo_name(_repo(record["repo"]).kind, _text(name)).name for name in _list(record["aliases"], 1000)),
        {
            _matching(name, _REVISION, "revision"): Ref(_commit(commit), _time(at))
            for name, (commit, at) in _table(record["refs"], MAX_REFS).items()
        },
        tuple(_read_revision(revision) for revision in _list(record["revisions"], MAX_REFS)),
        tuple(_read_document(*one) for one in _list(record["documents"], 10_000)),
        None if git is None else _read_git(git),
    )


def _read_revision(record: dict[str, Any]) -> Revision:
    if record["scan"] is not None:
        _text(record["scan"])
    return Revision(
        _commit(record["commit"]),
        _table(record["about"], MAX_ITEMS),
        _flag(record["has_files"]),
        _flag(record["has_tree"]),
        _flag(record["is_huge"]),
        _time(record["learnt_at"]),
        tuple(_read_entry(*entry) for entry in _list(record["entries"], MAX_ITEMS)),
        record["scan"],
    )


def _read_entry(order: str, row: dict[str, Any]) -> Entry:
    path = _text(order).removesuffix("/")
    if not is_path(path) or len(path.encode()) > MAX_PATH_BYTES:
        raise ValueError(f"{path[:100]!r} is no path of a file")
    if row.get("oid") is not None:
        _commit(row["oid"])
    if "dir" not in row:
        _count(row["size"])
        _text(row["etag"])
        if row.get("pointer") is not None:
            _count(row["pointer"])
    return entry_from_row(path, row)


def _read_document(path: str, at: float, value: Any, next_query: str | None) -> Document:
    if next_query is not None:
        _text(next_query)
    return Document(_matching(path, _DOCUMENT, "document"), _time(at), value, next_query)


def _read_git(git: dict[str, Any]) -> GitPart:
    refs = {_matching(name, _GIT_REF, "ref"): _commit(oid) for name, oid in _table(git["refs"], MAX_REFS).items()}
    head = None if git["head"] is None else _matching(git["head"], _GIT_REF, "ref")
    item = None if git["item"] is None else _matching(git["item"], _HEX64, "item")
    return GitPart(refs, head, _matching(git["digest"], _HEX64, "digest"), _time(git["asked_at"]), item)


def _read_item(kind: str, name: str, size: int) -> Item:
    item = Item(ItemKind(kind), _text(name), _count(size))
    if item.kind is not ItemKind.BLOB:
        _matching(name, _HEX64, "item")
    BlobId.from_etag(name)
    return item


def _read_part(name: str, size: int, sha256: str) -> Part:
    return Part(_text(name), _count(size), _matching(sha256, _HEX64, "hash"))


def _check(bundle: Bundle) -> None:
    """What no single field shows."""
    _once((str(record.repo) for record in bundle.repos), "repo")
    _once((item.name for item in bundle.items), "item")
    _once((str(one) for one in bundle.carried), "carried manifest")
    for number, part in enumerate(bundle.parts, 1):
        if part.name != PART.format(number) or not part.size:
            raise BundleRefused(f"{MANIFEST}: part {number} is called {part.name[:100]!r}, or is empty")
    told, real = sum(item.size for item in bundle.items), sum(part.size for part in bundle.parts)
    if told != real:
        raise BundleRefused(f"{MANIFEST}: its items have {told} bytes, its parts {real}")
    blobs = {item.blob: item.size for item in bundle.items if item.kind is ItemKind.BLOB}
    gits = {item.name for item in bundle.items if item.kind is ItemKind.GIT}
    proofs = {item.name for item in bundle.items if item.kind is ItemKind.PROOF}
    if proofs != {item for _, item in bundle.proofs}:
        raise BundleRefused(f"{MANIFEST}: its proofs are not those among its items")
    used: set[BlobId] = set()
    for record in bundle.repos:
        _once((revision.commit for revision in record.revisions), f"commit of {record.repo}")
        _once((one.path for one in record.documents), f"document of {record.repo}")
        for revision in record.revisions:
            _check_tree(record.repo, revision)
            for entry in revision.entries:
                if entry.blob in blobs and blobs[entry.blob] != entry.size:
                    raise BundleRefused(f"{MANIFEST}: {record.repo}:{entry.path} has two sizes")
                if entry.blob is not None:
                    used.add(entry.blob)
        if record.git is not None and record.git.item is not None and record.git.item not in gits:
            raise BundleRefused(f"{MANIFEST}: the git objects of {record.repo} are not among its items")
    if bundle.since is None and bundle.carried:
        raise BundleRefused(f"{MANIFEST}: it is the first of its line, and says that others came before it")
    if bundle.since is None and not set(blobs) <= used:
        raise BundleRefused(f"{MANIFEST}: it has blobs that no file of it names")
    if bundle.since is None and not used <= set(blobs) | bundle.missing:
        raise BundleRefused(f"{MANIFEST}: it names files whose content it neither brings nor calls missing")


def _check_tree(repo: Repo, revision: Revision) -> None:
    orders = [tree_order(entry) for entry in revision.entries]
    if orders != sorted(set(orders)):
        raise BundleRefused(f"{MANIFEST}: the files of {repo}@{revision.commit} are not in order, or one is there twice")
    files = {entry.path for entry in revision.entries if not entry.is_directory}
    for entry in revision.entries:
        parent = entry.path
        while parent := parent.rpartition("/")[0]:
            if parent in files:
                raise BundleRefused(f"{MANIFEST}: {parent!r} of {repo}@{revision.commit} is a file and a directory")


def _once(names: Iterable[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise BundleRefused(f"{MANIFEST}: the {what} {name[:100]!r} is there twice")
        seen.add(name)


# — fields —————————————————————————————————————————————————————————————————————————————————————————


def _repo(text: Any) -> Repo:
    repo = Repo.from_text(_text(text))
    try:
        return parse_repo_name(repo.kind, repo.name)
    except NearhubError as exc:
        raise ValueError(exc.message) from None


def _commit(text: Any) -> str:
    if not is_commit(_text(text)):
        raise ValueError(f"{text[:100]!r} is no commit")
    return str(text)


def _matching(text: Any, pattern: re.Pattern[str], what: str) -> str:
    if not pattern.match(_text(text)):
        raise ValueError(f"{text[:100]!r} is no {what}")
    return str(text)


def _text(value: Any) -> str:
    return _typed(value, str)


def _flag(value: Any) -> bool:
    return _typed(value, bool)


def _url(value: Any) -> str:
    return _matching(value, re.compile(r"https?://[!-~]{1,1000}\Z", re.ASCII), "URL")


def _count(value: Any) -> int:
    if not 0 <= _typed(value, int) < MAX_SIZE:
        raise ValueError(f"{str(value)[:40]} is no count")
    return int(value)


def _time(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1e11:
        raise ValueError(f"{str(value)[:40]} is no time")
    return value  # type: ignore[no-any-return]  # as it is, so that it is written again as it was


def _list(value: Any, most: int) -> list[Any]:
    if len(_typed(value, list)) > most:
        raise ValueError(f"more than {most} of one thing")
    return list(value)


def _table(value: Any, most: int) -> dict[str, Any]:
    if len(_typed(value, dict)) > most:
        raise ValueError(f"more than {most} of one thing")
    return dict(value)


def _typed(value: Any, kind: type[T]) -> T:
    if type(value) is not kind:
        raise TypeError(f"{str(value)[:40]!r} is of the wrong type")
    return value


def spans(bundle: Bundle) -> Sequence[tuple[Item, int]]:
    """Each item, and where it begins in the bytes of all parts."""
    found, position = [], 0
    for item in bundle.items:
        found.append((item, position))
        position += item.size
    return found
