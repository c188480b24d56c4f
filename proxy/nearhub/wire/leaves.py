"""What one leaf of the log says: the files that upstream named at one commit of a repo; or, blinded, that something was. Pure.

A leaf is canonical JSON, so that whoever knows its content can hash it. That of a repo which is not public is blinded: the HMAC
of it under a salt of its own. Who is shown both (the opening) can check it; nobody else learns even whether two are of one.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nearhub.errors import BadProof
from nearhub.wire.headers import Algo, BlobId
from nearhub.wire.target import is_commit

VERSION = 1
MAX_BYTES = 32_768
"""Of a leaf: a repo of more files has several at one commit."""
_WORDS = {Algo.SHA256: "lfs", Algo.SHA1: "git"}
SALT_BYTES = 32
_AROUND = len(':{"lfs":"","size":},')
_quoted = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(frozen=True, slots=True, order=True)
class Named:
    """What a path is: its blob, and its size in bytes."""

    blob: BlobId
    size: int

    def row(self) -> dict[str, Any]:
        return {_WORDS[self.blob.algo]: self.blob.hex, "size": self.size}

    @classmethod
    def from_row(cls, row: object) -> Named:
        """The inverse of row(); ValueError for anything else."""
        if not isinstance(row, dict) or len(row) != 2 or type(row.get("size")) is not int or row["size"] < 0:
            raise ValueError("a file is to have lfs or git, and size")
        for algo, word in _WORDS.items():
            if isinstance(row.get(word), str) and (blob := BlobId.from_etag(row[word])).algo is algo:
                return cls(blob, row["size"])
        raise ValueError("a file is to have lfs (a sha256) or git (a blob's sha1)")

    def __str__(self) -> str:
        return f"{self.blob} of {self.size:,} bytes"


@dataclass(frozen=True, slots=True)
class Leaf:
    """`time`: wall seconds when it was heard. `upstream`: the origin that said so."""

    time: int
    repo: str
    commit: str
    upstream: str
    files: Mapping[str, Named]

    def encode(self) -> bytes:
        files = {path: named.row() for path, named in self.files.items()}
        return canonical(
            {
                "commit": self.commit,
                "files": files,
                "repo": self.repo,
                "time": self.time,
                "upstream": self.upstream,
                "version": VERSION,
            }
        )

    @classmethod
    def decode(cls, entry: bytes) -> Leaf:
        """The inverse of encode(). Raises BadProof, also where the bytes are not the canonical ones."""
        try:
            told = json.loads(entry)
            if told["version"] != VERSION:
                raise BadProof(f"a leaf of version {told['version']!r}: this nearhub knows {VERSION}: upgrade")
            files = {path: Named.from_row(row) for path, row in told["files"].items()}
            leaf = cls(int(told["time"]), told["repo"], told["commit"], told["upstream"], files)
            is_leaf = all(isinstance(word, str) for word in (leaf.repo, leaf.upstream)) and is_commit(leaf.commit)
        except (ValueError, KeyError, TypeError, AttributeError):
            is_leaf = False
        if not is_leaf or leaf.encode() != entry:
            raise BadProof("an entry of the log is no leaf of nearhub's")
        return leaf


def leaves_of(time: int, repo: str, commit: str, upstream: str, files: Iterable[tuple[str, Named]]) -> Iterator[Leaf]:
    """As few leaves as hold these files, each of at most MAX_BYTES."""
    empty = len(Leaf(time, repo, commit, upstream, {}).encode())
    chunk: dict[str, Named] = {}
    room = MAX_BYTES - empty
    for path, named in files:
        needed = len(_quoted(path).encode()) + len(named.blob.hex) + len(str(named.size)) + _AROUND
        if needed > room and chunk:
            yield Leaf(time, repo, commit, upstream, chunk)
            chunk, room = {}, MAX_BYTES - empty
        chunk[path] = named
        room -= needed
    if chunk:
        yield Leaf(time, repo, commit, upstream, chunk)


def blinded(entry: bytes, salt: bytes) -> bytes:
    """The leaf that is logged instead of `entry`."""
    return canonical({"blinded": hmac.new(salt, entry, hashlib.sha256).hexdigest(), "version": VERSION})


def is_blinded(entry: bytes) -> bool:
    return entry.startswith(b'{"blinded":')


def opening(entry: bytes, salt: bytes | None = None) -> bytes:
    """What a proof carries besides, so that its reader can make the leaf again."""
    return canonical({"leaf": entry.decode()} | ({} if salt is None else {"salt": salt.hex()}))


def opened(extra: bytes) -> tuple[Leaf, bytes]:
    """What is proven, and the entry that must be in the log for that. Raises BadProof."""
    try:
        told = json.loads(extra)
        entry, salt = told["leaf"].encode(), told.get("salt")
        logged = entry if salt is None else blinded(entry, bytes.fromhex(salt))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadProof("the proof does not say what is proven: its line 'extra' is damaged") from None
    return Leaf.decode(entry), logged


def canonical(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
