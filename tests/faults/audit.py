"""What is in a cache directory, byte by byte against the truth. No mirror runs meanwhile."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from tlog_scales.backend import LocalBackend
from tlog_scales.reader import TilesReader
from tlog_scales.signing import Vkey
from tlog_scales.tlog import Checkpoint, ConsistencyProof

from nearhub.store.blobs import BlobStore
from nearhub.store.index import Index
from nearhub.wire.headers import BlobId
from nearhub.wire.spans import Span, blocks_inside, blocks_touching
from tests.hub import Content

Truth = Mapping[BlobId, Content]


@dataclass(slots=True)
class Audit:
    """`durable`: bytes by blob that the store vouches for, in partial blobs and in complete ones."""

    durable: dict[BlobId, int] = field(default_factory=dict)
    complete: set[BlobId] = field(default_factory=set)
    blocks: int = 0
    """Blocks that the store vouches for."""
    partial: int = 0
    """… of these in blobs that are not complete."""
    wrong: list[tuple[BlobId, int]] = field(default_factory=list)
    """(blob, block) of which a byte is not the truth."""
    strangers: list[str] = field(default_factory=list)
    """Names in blobs/ and partial/ that nobody asked for, and indexes that had to be moved away."""

    def __repr__(self) -> str:
        return (
            f"<Audit {self.blocks} blocks ({self.partial} partial), {len(self.complete)} complete, "
            f"{len(self.wrong)} wrong, {self.strangers}>"
        )


def audit(
    cache: Path, truth: Truth, *, recover: bool, trusted: set[tuple[BlobId, int]] | None = None, store: BlobStore | None = None
) -> Audit:
    """Compare everything. `recover` first, as a mirror does at start; else it finds things as the crash left them.

    `trusted` are blocks that an earlier audit has compared: skipped, and added to.
    """
    store = store or BlobStore(cache)
    seen = trusted if trusted is not None else set()
    found = Audit()
    if recover:
        store.recover()
    for blob, content in truth.items():
        fd = store.open_complete(blob)
        if fd is not None:
            found.complete.add(blob)
            size = os.fstat(fd).st_size
            spans = [Span(0, content.size)]
            if size != content.size:
                found.wrong.append((blob, min(size, content.size) // store.block))
                spans = []
        elif (cache / "partial" / str(blob)).exists():
            # As the fill engine opens it: what is torn is begun anew, what is marked is believed.
            partial = store.open_partial(blob, content.size)
            fd, spans = os.dup(partial.fd), list(partial.durable)
            store.close(partial)
        else:
            found.durable[blob] = 0
            continue
        found.durable[blob] = sum(map(len, spans))
        try:
            for span in spans:
                _compare(fd, blob, content, span, store.block, seen, found)
                found.partial += 0 if blob in found.complete else len(blocks_touching(span, store.block))
        finally:
            os.close(fd)
    known = {str(blob) for blob in truth}
    found.strangers += [entry.name for entry in (cache / "partial").iterdir() if entry.name not in known]
    names = {blob.hex for blob in truth}
    found.strangers += [path.name for path in (cache / "blobs").rglob("*") if path.is_file() and path.name not in names]
    found.strangers += [path.name for path in cache.glob("index.broken*")]
    return found


def _compare(
    fd: int, blob: BlobId, content: Content, span: Span, block: int, seen: set[tuple[BlobId, int]], found: Audit
) -> None:
    assert list(blocks_touching(span, block)) == list(blocks_inside(span, content.size, block)), (
        f"{blob}: marks of half a block"
    )
    for index in blocks_touching(span, block):
        found.blocks += 1
        if (blob, index) in seen:
            continue
        if is_true(fd, content, index * block, min(content.size, (index + 1) * block)):
            seen.add((blob, index))
        else:
            found.wrong.append((blob, index))


def is_true(fd: int, content: Content, start: int, stop: int) -> bool:
    """Whether the file holds the content's bytes in [start, stop)."""
    while start < stop:
        expected = content.read(start, stop)
        if os.pread(fd, len(expected), start) != expected:
            return False
        start += len(expected)
    return True


ROWS = ("alias ", "visible ", "ref ", "manifest ", "path ", "doc ", "seen ")


def check_index(cache: Path, acknowledged: Iterable[tuple[str, str, int]]) -> None:
    """The index is sound, every row of it can be read, and what clients were told (key, etag, size) is in it."""
    with closing(sqlite3.connect(cache / "index" / "cache.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    index = Index(cache / "index")
    try:
        rows = {key: row for prefix in ROWS for key, row in index.scan(prefix)}
    finally:
        index.close()
    for key, etag, size in acknowledged:
        row = rows.get(f"path public {key}", {})
        assert (row.get("etag"), row.get("size")) == (etag, size), f"{key}: the index has {row}"


class LogAudit:
    """The log's files as another implementation reads them; each look checks that the log only grew."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._seen: Checkpoint | None = None

    def look(self) -> list[bytes]:
        """Signature, root, consistency with the last look; every entry."""
        reader = TilesReader(LocalBackend(self._directory))
        checkpoint = reader.get_checkpoint()
        checkpoint.verify(Vkey.from_string((self._directory / "vkey").read_text().strip()))
        assert reader.calculate_root_hash() == checkpoint.root_hash
        if self._seen is not None:
            old = self._seen
            proof = (
                reader.get_consistency_proof(old.size, checkpoint.size)
                if old.size
                else ConsistencyProof(0, checkpoint.size, [])
            )
            proof.check(old.root_hash, checkpoint.root_hash)
        self._seen = checkpoint
        return [reader.get_entry(number) for number in range(checkpoint.size)]
