"""The store as a state machine that is killed, or loses its power, at any operation: what recovery believes is true (P8).

Model: of each blob the true content; the images that were being written when it was begun (the truth, or what a lying upstream
sends); what was acknowledged. After any crash: complete blobs are the truth, durable blocks are of one image, what was
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

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nearhub.store.blobs import BlobStore, Partial
from nearhub.store.disk import Disk
from nearhub.wire.headers import Algo, BlobId
from nearhub.wire.spans import Span, SpanSet, block_count, block_span, blocks_inside, blocks_touching
from tests.proxy.store.disks import Crash, CrashingDisk, LosingDisk

BLOCK = 4
CONTENTS = [bytes(range(1, 1 + size)) for size in (0, 2 * BLOCK, 5 * BLOCK + 3)]
TRUTH = {BlobId(Algo.SHA256, hashlib.sha256(content).hexdigest()): content for content in CONTENTS}
TRUTH |= {BlobId(Algo.SHA1, hashlib.sha1(b"blob 7\0" + b"GITBLOB").hexdigest()): b"GITBLOB"}
BLOBS = st.sampled_from(sorted(TRUTH))
ADDRESSES = st.sampled_from(["10.0.0.1", "10.0.0.2", "fd00::1"])
DEATHS = st.none() | st.tuples(st.sampled_from([0, 1, 2, 2, 3, 4, 5, 6, 8, 12]), st.integers(0, 2**32))
"""(operations of the disk until the process dies, seed of what the disk then has); None: as was decided before."""


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


class StoreMachine(RuleBasedStateMachine):
    """Every operation of the store, on a few small blobs, until the process dies; then recovery, which may die too."""

    disk: CrashingDisk

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="nearhub-test-")) / "cache"
        for part in ("blobs/sha256", "blobs/sha1", "partial", "quarantine"):
            (self.root / part).mkdir(parents=True)
        self.disk = self.new_disk()
        self.seed = 0
        self.known = {blob: Known() for blob in TRUTH}
        self.open: dict[BlobId, Partial] = {}
        self.written: dict[BlobId, SpanSet] = {}
        self.store = self.new_store()
        self.store.recover()

    def new_disk(self) -> CrashingDisk:
        return CrashingDisk()

    def power(self, rng: random.Random) -> None:
        """What a crash does to the disk: nothing, when it is only the process that dies."""

    def new_store(self) -> BlobStore:
        return BlobStore(self.root, block=BLOCK, clock=lambda: 1e9, disk=self.disk)

    def teardown(self) -> None:
        for partial in self.open.values():
            os.close(partial.fd)
            os.close(partial._present_fd)
        if isinstance(self.disk, LosingDisk):
            self.disk.close()
        shutil.rmtree(self.root.parent)

    def survive(self, operation: Callable[[], None], death: tuple[int, int] | None = None) -> None:
        """Run it; should the process die in it, begin again."""
        if death is not None:
            self.disk.left, self.seed = death
        try:
            operation()
        except Crash:
            self.restart(random.Random(self.seed))

    def restart(self, rng: random.Random) -> None:
        for partial in self.open.values():
            os.close(partial.fd)
            os.close(partial._present_fd)
        self.open, self.written = {}, {}
        self.disk.left = None
        self.power(rng)
        self.store = self.new_store()
        kept = self.store.recover()
        for blob in TRUTH:
            self.check_after_recovery(blob, blob in kept)

    def check_after_recovery(self, blob: BlobId, is_kept: bool) -> None:
        known, content = self.known[blob], TRUTH[blob]
        complete = self.complete(blob)
        assert complete in (None, content), "a complete blob is not what its name says"
        assert complete is not None or not known.is_published, "a published blob is lost"
        mismatch = self.store.mismatch(blob)
        if known.failures:
            assert mismatch is not None and mismatch.count >= known.failures and mismatch.readers >= known.tainted
        if complete is not None:
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
        images = [image for image in known.images if self.has_only(partial, image)]
        assert images, "bytes are believed that nobody wrote"
        assert images[-1] == known.images[-1] or not known.acknowledged, "bytes of another time are believed"
        known.images, known.acknowledged = [images[-1]], blocks

    def has_only(self, partial: Partial, image: bytes) -> bool:
        """Whether every durable byte is of `image`."""
        return all(os.pread(partial.fd, len(span), span.start) == image[span.start : span.stop] for span in partial.durable)

    def complete(self, blob: BlobId) -> bytes | None:
        fd = Disk().open_read(path) if (path := self.store.path_of(blob)).exists() else None
        if fd is None:
            return None
        with os.fdopen(fd, "rb") as file:
            return file.read()

    # — what the fill engine does ————————————————————————————————————————————————————————————————

    @rule(blob=BLOBS, is_lying=st.booleans(), death=DEATHS)
    def begin(self, blob: BlobId, is_lying: bool, death: tuple[int, int] | None) -> None:
        if blob in self.open or self.complete(blob) is not None:
            return
        known, content = self.known[blob], TRUTH[blob]

        def open_partial() -> None:
            partial = self.store.open_partial(blob, len(content))
            known.is_condemned = False
            if not partial.durable:
                known.images.append(lie(content) if is_lying else content)
            self.open[blob], self.written[blob] = partial, partial.durable.copy()

        self.survive(open_partial, death)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), much=st.sampled_from(["all", "a block", "a block", "a piece"]))
    def write(self, data: st.DataObject, much: str) -> None:
        """Any bytes that are not there yet, as they come from upstream; blocks in any order, in pieces."""
        blob = data.draw(st.sampled_from(sorted(self.open)))
        size = len(TRUTH[blob])
        missing = list(self.written[blob].missing(Span(0, size)))
        if not missing:
            return
        span = data.draw(st.sampled_from(missing))
        if much == "a block":
            index = data.draw(st.sampled_from(blocks_touching(span, BLOCK)))
            span = span.overlap(block_span(index, size, BLOCK))
        elif much == "a piece":
            start = data.draw(st.integers(span.start, span.stop - 1))
            span = Span(start, data.draw(st.integers(start + 1, span.stop)))
        image = self.known[blob].images[-1]

        def write() -> None:
            self.store.write(self.open[blob], span.start, [image[span.start : span.stop]])
            self.written[blob].add(span)

        self.survive(write)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), death=DEATHS)
    def commit(self, data: st.DataObject, death: tuple[int, int] | None) -> None:
        blob = data.draw(st.sampled_from(sorted(self.open)))
        size, partial = len(TRUTH[blob]), self.open[blob]
        whole = {i for span in self.written[blob] for i in blocks_inside(span, size, BLOCK)}
        blocks = sorted(i for i in whole if not partial.durable.covers(block_span(i, size, BLOCK)))

        def commit() -> None:
            self.store.commit(partial, blocks)
            self.known[blob].acknowledged |= set(blocks)

        self.survive(commit, death)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), address=ADDRESSES, death=DEATHS)
    def note_reader(self, data: st.DataObject, address: str, death: tuple[int, int] | None) -> None:
        blob = data.draw(st.sampled_from(sorted(self.open)))

        def note() -> None:
            self.store.note_reader(self.open[blob], address)
            self.known[blob].noted.add(address)

        self.survive(note, death)

    @precondition(lambda self: any(self.is_whole(blob) for blob in self.open))
    @rule(data=st.data(), address=ADDRESSES, death=DEATHS)
    def verify(self, data: st.DataObject, address: str, death: tuple[int, int] | None) -> None:
        """The last step of a fill: publish what is right, quarantine what is wrong."""
        blob = data.draw(st.sampled_from([blob for blob in sorted(self.open) if self.is_whole(blob)]))
        known, partial = self.known[blob], self.open[blob]
        noted = set(known.noted)
        known.forget_partial()

        def publish() -> None:
            self.store.publish(partial)
            known.is_published = True
            self.close(blob)

        def quarantine() -> None:
            mismatch = self.store.quarantine(partial, [address])
            known.failures, known.is_condemned = mismatch.count, True
            known.tainted |= {address} | noted
            assert mismatch.readers >= known.tainted
            self.close(blob)

        self.survive(publish if known.images[-1] == TRUTH[blob] else quarantine, death)

    def is_whole(self, blob: BlobId) -> bool:
        return self.written[blob].covers(Span(0, len(TRUTH[blob])))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def end_fill(self, data: st.DataObject) -> None:
        """Its readers left: what is durable is kept, what is merely written may be believed by nobody."""
        self.close(data.draw(st.sampled_from(sorted(self.open))))

    def close(self, blob: BlobId) -> None:
        self.store.close(self.open.pop(blob))
        del self.written[blob]

    @rule(blob=BLOBS, death=DEATHS)
    def evict(self, blob: BlobId, death: tuple[int, int] | None) -> None:
        if blob in self.open:
            return
        known = self.known[blob]
        known.is_published = False
        known.forget_partial()

        def remove() -> None:
            self.store.remove(blob)
            assert self.complete(blob) is None

        self.survive(remove, death)

    @rule(death=DEATHS)
    def die_soon(self, death: tuple[int, int] | None) -> None:
        """In whatever comes next."""
        if death is not None:
            self.disk.left, self.seed = death

    @rule(seed=st.integers(0, 2**32))
    def die_now(self, seed: int) -> None:
        self.restart(random.Random(seed))

    @rule(left=st.integers(0, 25), seed=st.integers(0, 2**32))
    def die_in_recovery(self, left: int, seed: int) -> None:
        """Twice: once while nothing is under way, once more in the recovery after it."""
        for partial in self.open.values():
            os.close(partial.fd)
            os.close(partial._present_fd)
        self.open, self.written = {}, {}
        self.disk.left = None
        self.power(random.Random(seed))
        self.survive(lambda: [self.new_store().recover()].clear(), (left, seed))
        self.restart(random.Random(seed + 1))

    @invariant()
    def what_is_served_is_true(self) -> None:
        for blob, content in TRUTH.items():
            assert self.complete(blob) in (None, content)
            assert not (self.known[blob].is_published and self.complete(blob) is None)
        for blob, partial in self.open.items():
            assert self.has_only(partial, self.known[blob].images[-1])


class KilledStore(StoreMachine):
    """kill -9: the process dies, the system lives."""


class PowerlessStore(StoreMachine):
    """A power cut: what was not synced may be lost, any part of it."""

    def new_disk(self) -> CrashingDisk:
        return LosingDisk(self.root)

    def power(self, rng: random.Random) -> None:
        assert isinstance(self.disk, LosingDisk)
        self.disk.cut(rng)


TestKilledStore = KilledStore.TestCase
TestKilledStore.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPowerlessStore = PowerlessStore.TestCase
TestPowerlessStore.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_every_operation_of_the_disk_is_one_it_can_die_in(tmp_path: Path) -> None:
    """Else the machines above would not try all moments."""
    operations = [name for name in vars(Disk) if not name.startswith("_")]
    assert len(operations) >= 11
    assert all(name in vars(CrashingDisk) for name in operations)
