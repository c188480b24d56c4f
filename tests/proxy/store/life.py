"""A model of the store's life: what was true, what was acknowledged, and what must hold after any crash.

Of each blob it knows the true content; the images that were being written when it was begun (the truth, or what a lying
upstream sends); what was acknowledged. After any crash: complete blobs are the truth, durable blocks are of one image, what was
acknowledged is there, and what was quarantined is not.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from nearhub.store.blobs import BlobStore, Partial
from nearhub.store.disk import Disk
from nearhub.wire.headers import Algo, BlobId
from nearhub.wire.spans import Span, SpanSet, block_count, block_span, blocks_inside
from tests.proxy.store.disks import Crash, CrashingDisk, LosingDisk

BLOCK = 4
LARGE = bytes(range(1, 5 * BLOCK + 4))
_CONTENTS = (b"", LARGE[: 2 * BLOCK], LARGE)
TRUTH = {BlobId(Algo.SHA256, hashlib.sha256(content).hexdigest()): content for content in _CONTENTS}
TRUTH |= {BlobId(Algo.SHA1, hashlib.sha1(b"blob 7\0" + b"GITBLOB").hexdigest()): b"GITBLOB"}

Death = tuple[int, int]
"""(operations of the disk until the process dies, seed of what the disk then has)."""


def lie(content: bytes) -> bytes:
    """Not one byte is right."""
    return bytes(byte ^ 0xFF for byte in content)


class Known:
    """What the model knows of one blob."""

    def __init__(self) -> None:
        self.images: list[bytes] = []
        """What may be on disk of it, the one being written last."""
        self.acknowledged: set[int] = set()
        """Blocks of the last image that must be durable."""
        self.noted: set[str] = set()
        self.is_published = False
        self.is_condemned = False
        self.failures = 0
        self.tainted: set[str] = set()

    def forget_partial(self) -> None:
        """Something was begun that may, or may not, have taken the partial blob away."""
        self.acknowledged, self.noted = set(), set()


class Life:
    """A store, one process after the other. `loses_power`: a crash is a power cut, else it is a kill -9."""

    def __init__(self, *, loses_power: bool) -> None:
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a thousand small trees: no disk need wait for them
        self.root = Path(tempfile.mkdtemp(prefix="nearhub-test-", dir=memory)) / "cache"
        for part in ("blobs/sha256", "blobs/sha1", "partial", "quarantine"):
            (self.root / part).mkdir(parents=True)
        self.disk: CrashingDisk = LosingDisk(self.root) if loses_power else CrashingDisk()
        self.known = {blob: Known() for blob in TRUTH}
        self.open: dict[BlobId, Partial] = {}
        self.written: dict[BlobId, SpanSet] = {}
        self.seed = 0
        self.crashes = 0
        self.store = self._new_store()
        self.store.recover()

    def _new_store(self) -> BlobStore:
        return BlobStore(self.root, block=BLOCK, clock=lambda: 1e9, disk=self.disk)

    def end(self) -> None:
        self._die()
        if isinstance(self.disk, LosingDisk):
            self.disk.close()
        shutil.rmtree(self.root.parent)

    # — what the fill engine does ————————————————————————————————————————————————————————————————

    def begin(self, blob: BlobId, *, is_lying: bool = False) -> None:
        if blob in self.open or self.complete(blob) is not None:
            return
        known, content = self.known[blob], TRUTH[blob]

        def open_partial() -> None:
            partial = self.store.open_partial(blob, len(content))
            known.is_condemned = False
            if not partial.durable:
                known.images.append(lie(content) if is_lying else content)
            self.open[blob], self.written[blob] = partial, partial.durable.copy()

        self.survive(open_partial)

    def write(self, blob: BlobId, span: Span) -> None:
        image = self.known[blob].images[-1]

        def write() -> None:
            self.store.write(self.open[blob], span.start, [image[span.start : span.stop]])
            self.written[blob].add(span)

        self.survive(write)

    def uncommitted(self, blob: BlobId) -> list[int]:
        """Blocks that are whole and not yet durable."""
        size, durable = len(TRUTH[blob]), self.open[blob].durable
        whole = {i for span in self.written[blob] for i in blocks_inside(span, size, BLOCK)}
        return sorted(i for i in whole if not durable.covers(block_span(i, size, BLOCK)))

    def commit(self, blob: BlobId) -> None:
        partial, blocks = self.open[blob], self.uncommitted(blob)

        def commit() -> None:
            self.store.commit(partial, blocks)
            self.known[blob].acknowledged |= set(blocks)

        self.survive(commit)

    def note_reader(self, blob: BlobId, address: str) -> None:
        def note() -> None:
            self.store.note_reader(self.open[blob], address)
            self.known[blob].noted.add(address)

        self.survive(note)

    def is_whole(self, blob: BlobId) -> bool:
        return self.written[blob].covers(Span(0, len(TRUTH[blob])))

    def verify(self, blob: BlobId, address: str) -> None:
        """The last step of a fill: publish what is right, quarantine what is wrong."""
        known, partial = self.known[blob], self.open[blob]
        noted, is_true = set(known.noted), known.images[-1] == TRUTH[blob]
        if not is_true or isinstance(self.disk, LosingDisk):
            known.forget_partial()  # a cut may take a file that moves between directories out of both

        def publish() -> None:
            self.store.publish(partial)
            known.forget_partial()
            known.is_published = True
            self.close(blob)

        def quarantine() -> None:
            mismatch = self.store.quarantine(partial, [address])
            known.failures, known.is_condemned = mismatch.count, True
            known.tainted |= {address} | noted
            assert mismatch.readers >= known.tainted
            self.close(blob)

        self.survive(publish if is_true else quarantine)

    def close(self, blob: BlobId) -> None:
        self.store.close(self.open.pop(blob))
        del self.written[blob]

    def evict(self, blob: BlobId) -> None:
        if blob in self.open:
            return
        self.known[blob].is_published = False
        self.known[blob].forget_partial()

        def remove() -> None:
            self.store.remove(blob)
            assert self.complete(blob) is None

        self.survive(remove)

    # — dying ————————————————————————————————————————————————————————————————————————————————————

    def die_after(self, death: Death | None) -> None:
        """In the operation after so many more; None: as was decided before."""
        if death is not None:
            self.disk.left, self.seed = death

    def survive(self, operation: Callable[[], None]) -> None:
        """Run it; should the process die in it, begin again."""
        try:
            operation()
        except Crash:
            self.restart()

    def restart(self, death_in_recovery: int | None = None) -> None:
        """The process ends without a word, and another one begins; it may die too, in its recovery."""
        self.crashes += 1
        self._die()
        if death_in_recovery is not None:
            self.disk.left = death_in_recovery
            try:
                self._new_store().recover()
            except Crash:
                self._die()
        self.disk.left = None
        self.store = self._new_store()
        kept = self.store.recover()
        for blob in TRUTH:
            self._check_after_recovery(blob, is_kept=blob in kept)
        self.check()

    def _die(self) -> None:
        for partial in self.open.values():
            os.close(partial.fd)
            os.close(partial._present_fd)
        self.open, self.written = {}, {}
        self.disk.left = None
        if isinstance(self.disk, LosingDisk):
            self.disk.cut(random.Random(self.seed))

    # — what must hold ———————————————————————————————————————————————————————————————————————————

    def check(self) -> None:
        """Always, also while fills are under way."""
        for blob, content in TRUTH.items():
            complete = self.complete(blob)
            assert complete in (None, content), "a complete blob is not what its name says"
            assert complete is not None or not self.known[blob].is_published, "a published blob is lost"
        for blob, partial in self.open.items():
            assert self._has_only(partial, self.known[blob].images[-1]), "bytes are believed that nobody wrote"

    def _check_after_recovery(self, blob: BlobId, *, is_kept: bool) -> None:
        known, content = self.known[blob], TRUTH[blob]
        mismatch = self.store.mismatch(blob)
        if known.failures:
            assert mismatch is not None, "a failed verification is forgotten"
            assert mismatch.count >= known.failures and mismatch.readers >= known.tainted
        if self.complete(blob) is not None:
            assert not is_kept
            known.forget_partial()
            return
        assert is_kept or not known.acknowledged, "acknowledged blocks are lost"
        assert not (is_kept and known.is_condemned), "what failed verification came back"
        if not is_kept:
            return
        partial = self.store.open_partial(blob, len(content))
        self.open[blob], self.written[blob] = partial, partial.durable.copy()
        blocks = {
            i for i in range(block_count(len(content), BLOCK)) if partial.durable.covers(block_span(i, len(content), BLOCK))
        }
        assert blocks >= known.acknowledged, "acknowledged blocks are lost"
        assert partial.readers >= known.noted, "a reader is forgotten"
        if not blocks:
            known.images.append(content)  # begun anew, and this time with the truth
            return
        images = [image for image in known.images if self._has_only(partial, image)]
        assert images, "bytes are believed that nobody wrote"
        assert images[-1] == known.images[-1] or not known.acknowledged, "bytes of another time are believed"
        known.images, known.acknowledged = [images[-1]], blocks

    def _has_only(self, partial: Partial, image: bytes) -> bool:
        """Whether every durable byte is of `image`."""
        return all(os.pread(partial.fd, len(span), span.start) == image[span.start : span.stop] for span in partial.durable)

    def complete(self, blob: BlobId) -> bytes | None:
        path = self.store.path_of(blob)
        if not path.exists():
            return None
        with os.fdopen(Disk().open_read(path), "rb") as file:
            return file.read()


def missing(spans: SpanSet, blob: BlobId) -> list[Span]:
    return list(spans.missing(Span(0, len(TRUTH[blob]))))
