"""Upstream bytes fed split at every offset, and cut at every offset: the blob is right, and nothing is asked for twice.

A store with blocks of 4 bytes and a scripted upstream, so that every case of a 13-byte blob is run.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from yarl import URL

from nearhub.errors import UpstreamFailed
from nearhub.fill import FillEngine, Patience, Source
from nearhub.metrics import Metrics
from nearhub.reader import FilePiece
from nearhub.store.bares import BareStore
from nearhub.store.blobs import BlobStore, Partial
from nearhub.store.eviction import Space
from nearhub.store.holdings import Holdings
from nearhub.store.site_bodies import SiteBodies
from nearhub.upstream.client import Body, Location, Upstream
from nearhub.upstream.dispatch import Dispatcher
from nearhub.wire.headers import BlobId, FileMetadata
from nearhub.wire.ranges import Asked, Shape
from nearhub.wire.spans import Span, SpanSet
from nearhub.wire.target import FileTarget, Repo, RepoKind

CONTENT = b"thirteen byte"
BLOB = BlobId.from_etag(hashlib.sha256(CONTENT).hexdigest())
SOURCE = Source(FileTarget(Repo(RepoKind.MODELS, "o/m"), "a" * 40, "f"), FileMetadata("a" * 40, BLOB, len(CONTENT)))


class SplitBody(Body):
    """The bytes of a span in given pieces, and then an error if the pieces end early."""

    def __init__(self, span: Span, pieces: list[bytes]) -> None:
        self.span, self.location, self._pieces = span, Location(URL("http://cdn.test/f"), None), pieces

    async def chunks(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece
        if sum(map(len, self._pieces)) < len(self.span):
            raise UpstreamFailed("cut")


class SplitUpstream(Upstream):
    """Splits every answer at the same file offsets; cuts the first answer that reaches `cut_at` there."""

    def __init__(self, splits: tuple[int, ...], cut_at: int | None = None, *, ignores_range: bool = False) -> None:
        self.url, self.trusted = "http://hub.test", True
        self.splits, self.cut_at, self.ignores_range = splits, cut_at, ignores_range
        self.sent = 0

    @asynccontextmanager
    async def fetch(self, target: FileTarget, meta: FileMetadata, span: Span, location: Location | None) -> AsyncIterator[Body]:
        if self.ignores_range:
            span = Span(0, len(CONTENT))
        stop = span.stop
        if self.cut_at is not None and span.start <= self.cut_at < span.stop:
            stop, self.cut_at = self.cut_at, None
        marks = [span.start, *(s for s in self.splits if span.start < s < stop), stop]
        pieces = [CONTENT[a:b] for a, b in itertools.pairwise(marks)]
        self.sent += stop - span.start
        yield SplitBody(span, pieces)


class OnceStore(BlobStore):
    """A store in which no byte may be written twice: readers may have seen it."""

    def write(self, partial: Partial, offset: int, buffers: Sequence[bytes | memoryview]) -> None:
        span = Span(offset, offset + sum(map(len, buffers)))
        assert list(written.setdefault(id(partial), SpanSet()).missing(span)) == [span], "a byte was written twice"
        written[id(partial)].add(span)
        super().write(partial, offset, buffers)


written: dict[int, SpanSet] = {}


async def fill(root: Path, upstream: SplitUpstream, connections: int) -> bytes:
    """Bring the blob; what the published file holds."""
    for part in ("blobs/sha256", "partial", "quarantine"):
        (root / part).mkdir(parents=True)
    written.clear()
    store = OnceStore(root, block=4)
    dispatcher = Dispatcher([upstream], connections=8, client_connections=8)
    metrics = Metrics()
    space = Space(Holdings(store, BareStore(store.root / "git"), SiteBodies(store.root / "sites")), metrics, limit=None)
    engine = FillEngine(store, space, dispatcher, metrics, connections=connections, patience=Patience(first_backoff_s=0.0))
    reader = await engine.open(SOURCE, Asked(Span(0, len(CONTENT)), Shape.OPEN), "client")
    await reader.ready()
    got = b""
    while (piece := await reader.next_piece()) is not None:
        assert isinstance(piece, FilePiece)
        got += os.pread(piece.fd, len(piece.span), piece.span.start)
    reader.close()
    for running in engine.running:
        await running.done.wait()
    await engine.close()
    assert got == CONTENT
    return store.path_of(BLOB).read_bytes()


@pytest.mark.parametrize("connections", [1, 3])
@pytest.mark.parametrize("split", range(1, len(CONTENT)))
async def test_split_at_every_offset(tmp_path: Path, split: int, connections: int) -> None:
    """Wherever the pieces end, with one connection or several: right bytes, each of them asked for once."""
    upstream = SplitUpstream((split,))
    assert await fill(tmp_path, upstream, connections) == CONTENT
    assert upstream.sent == len(CONTENT)


async def test_byte_by_byte(tmp_path: Path) -> None:
    """Every byte a piece of its own."""
    upstream = SplitUpstream(tuple(range(1, len(CONTENT))))
    assert await fill(tmp_path, upstream, 2) == CONTENT
    assert upstream.sent == len(CONTENT)


@pytest.mark.parametrize("cut_at", range(len(CONTENT)))
async def test_cut_at_every_offset(tmp_path: Path, cut_at: int) -> None:
    """Wherever a connection is cut, the next one goes on at that byte: nothing is fetched twice."""
    upstream = SplitUpstream((), cut_at)
    assert await fill(tmp_path, upstream, 2) == CONTENT
    assert upstream.sent == len(CONTENT)


@pytest.mark.parametrize("cut_at", range(len(CONTENT)))
async def test_an_upstream_that_ignores_range_and_cuts(tmp_path: Path, cut_at: int) -> None:
    """It begins anew at 0 each time; what is here already is skipped, never written again."""
    upstream = SplitUpstream((3, 7), cut_at, ignores_range=True)
    assert await fill(tmp_path, upstream, 2) == CONTENT
    assert upstream.sent == len(CONTENT) + cut_at
