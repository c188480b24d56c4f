"""What a file of the stand-in Hub is made of, and how its identity is computed. No HTTP here.

A :class:`Source` is seekable bytes: in memory, on disk, or generated (:class:`Content`). A :class:`File` is a source
as git and LFS see it: size, git oid, and for LFS also the sha256, the Xet hash and the CDN's own ETag.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

PAGE = 1 << 20
_STRIDE = 611_953  # odd, so that page numbers below 2**20 all give different rotations


class Source(Protocol):
    """Seekable bytes of known length."""

    @property
    def size(self) -> int: ...

    def read(self, start: int, stop: int) -> bytes | memoryview:
        """Some bytes from `start`, at least one and none past `stop`; fewer than asked is allowed."""
        ...


@dataclass(frozen=True)
class Memory:
    """Bytes held in memory."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, start: int, stop: int) -> memoryview:
        return memoryview(self.data)[start:stop]


@dataclass(frozen=True)
class OnDisk:
    """A file on disk; the server sends it with sendfile where nothing stands in the way."""

    path: Path

    @cached_property
    def size(self) -> int:
        return self.path.stat().st_size

    def read(self, start: int, stop: int) -> bytes:
        with self.path.open("rb") as handle:
            handle.seek(start)
            return handle.read(stop - start)


@dataclass(frozen=True)
class Content:
    """`size` pseudo-random bytes fixed by `seed`: one random page, rotated differently for every MiB.

    Generating is a slice of a doubled page, so nothing is computed or copied per byte served; gigabytes cost two MiB.
    """

    size: int
    seed: int = 0

    @cached_property
    def _doubled(self) -> memoryview:
        page = hashlib.shake_256(b"content %d" % self.seed).digest(PAGE)
        return memoryview(page + page)

    def read(self, start: int, stop: int) -> memoryview:
        """The bytes from `start` up to `stop` or the end of that MiB, whichever comes first."""
        number, offset = divmod(start, PAGE)
        length = min(min(stop, self.size) - start, PAGE - offset)
        turned = (offset + number * _STRIDE) % PAGE
        return self._doubled[turned : turned + max(length, 0)]

    def bytes(self, start: int = 0, stop: int | None = None) -> bytes:
        """All the bytes of [start, stop): the oracle that tests compare downloads with."""
        return read_all(self, start, stop)

    @cached_property
    def sha256(self) -> str:
        return sha256_of(self)

    @cached_property
    def git_sha1(self) -> str:
        return git_blob_sha1(self)


def read_all(source: Source, start: int = 0, stop: int | None = None) -> bytes:
    """The bytes of [start, stop) in one piece."""
    end = source.size if stop is None else min(stop, source.size)
    parts = bytearray()
    while start + len(parts) < end:
        parts += source.read(start + len(parts), end)
    return bytes(parts)


def pieces(source: Source) -> Iterator[bytes | memoryview]:
    """All the bytes in order, some MiB at a time."""
    position = 0
    while position < source.size:
        piece = source.read(position, min(position + 4 * PAGE, source.size))
        yield piece
        position += len(piece)


def sha256_of(source: Source) -> str:
    """Hex sha256 of the whole source."""
    return _digest(source, hashlib.sha256())


def git_blob_sha1(source: Source) -> str:
    """The oid git gives these bytes as a blob."""
    return _digest(source, hashlib.sha1(b"blob %d\0" % source.size, usedforsecurity=False))


def _digest(source: Source, hasher: hashlib._Hash) -> str:
    for piece in pieces(source):
        hasher.update(piece)
    return hasher.hexdigest()


Given = bytes | str | Path | Source
"""What tests may write where a file's bytes are wanted."""


def source_of(given: Given) -> Source:
    """Bytes, text, a path or a source, as a source."""
    if isinstance(given, bytes):
        return Memory(given)
    if isinstance(given, str):
        return Memory(given.encode())
    if isinstance(given, Path):
        return OnDisk(given)
    return given


@dataclass(frozen=True)
class LFS:
    """Marks a file of a commit as stored in LFS (and Xet); anything unmarked is a plain git file."""

    given: Given


@dataclass(frozen=True)
class File:
    """One file at one path of one commit."""

    source: Source
    is_lfs: bool = False
    media_type: str = field(default="application/octet-stream", compare=False)

    @property
    def size(self) -> int:
        return self.source.size

    @cached_property
    def sha256(self) -> str:
        """The LFS oid."""
        return self.source.sha256 if isinstance(self.source, Content) else sha256_of(self.source)

    @cached_property
    def pointer(self) -> bytes:
        """The LFS pointer text, which is what git stores for an LFS file."""
        return b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (
            self.sha256.encode(),
            self.size,
        )

    @property
    def stored(self) -> Source:
        """What git stores: the content, or the pointer of an LFS file."""
        return Memory(self.pointer) if self.is_lfs else self.source

    @cached_property
    def git_oid(self) -> str:
        """The git blob sha1: of the content, or of the pointer of an LFS file."""
        if self.is_lfs:
            return git_blob_sha1(Memory(self.pointer))
        return self.source.git_sha1 if isinstance(self.source, Content) else git_blob_sha1(self.source)

    @property
    def etag(self) -> str:
        """The identity the Hub announces for this file, unquoted."""
        return self.sha256 if self.is_lfs else self.git_oid

    @cached_property
    def xet_hash(self) -> str:
        """64 hex that are not the sha256, the same for the same content everywhere."""
        return hashlib.sha256(b"xet " + self.sha256.encode()).hexdigest()

    @cached_property
    def cdn_etag(self) -> str:
        """The CDN's own 64-hex ETag: neither the sha256 nor the Xet hash."""
        return hashlib.sha256(b"cdn " + self.sha256.encode()).hexdigest()

    @cached_property
    def is_text(self) -> bool:
        """Whether a CDN would think it worth compressing."""
        if self.is_lfs or self.size > 16 * PAGE:
            return False
        data = read_all(self.source)
        try:
            data.decode()
        except UnicodeDecodeError:
            return False
        return b"\0" not in data


def file_of(given: Given | LFS) -> File:
    """What a test wrote for a file, as a File."""
    if isinstance(given, LFS):
        return File(source_of(given.given), is_lfs=True)
    return File(source_of(given), media_type="text/plain; charset=utf-8")
