"""BlobStore on a real directory: round trips, what is damaged or planted there, and what must not be thrown away."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nearhub.errors import StoreFailed
from nearhub.store.blobs import MISMATCH_MEMORY_S, BlobStore, _read_present
from nearhub.store.disk import Disk
from nearhub.wire.headers import Algo, BlobId
from nearhub.wire.spans import Span, SpanSet, block_span

BLOCK = 4
CONTENT = b"abcdefghijklmnopq"
SIZE = len(CONTENT)
BLOB = BlobId(Algo.SHA256, hashlib.sha256(CONTENT).hexdigest())


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for part in ("blobs/sha256", "blobs/sha1", "partial", "quarantine"):
        (tmp_path / part).mkdir(parents=True)
    return tmp_path


@pytest.fixture
def store(root: Path, clock: Clock) -> BlobStore:
    return BlobStore(root, block=BLOCK, clock=clock)


def fill(store: BlobStore, blocks: range = range(5), *, content: bytes = CONTENT) -> None:
    """Write and commit these blocks, and leave."""
    partial = store.open_partial(BLOB, SIZE)
    for index in blocks:
        span = block_span(index, SIZE, BLOCK)
        store.write(partial, span.start, [content[span.start : span.stop]])
    store.commit(partial, blocks)
    store.close(partial)


def durable(store: BlobStore) -> SpanSet:
    partial = store.open_partial(BLOB, SIZE)
    store.close(partial)
    return partial.durable


def publish(store: BlobStore) -> Path:
    fill(store)
    partial = store.open_partial(BLOB, SIZE)
    store.publish(partial)
    store.close(partial)
    return store.path_of(BLOB)


def quarantine(store: BlobStore, *readers: str) -> None:
    fill(store, content=b"?" * SIZE)
    partial = store.open_partial(BLOB, SIZE)
    store.quarantine(partial, readers)
    store.close(partial)


def directory(root: Path) -> Path:
    return root / "partial" / str(BLOB)


def blocks_of(spans: SpanSet) -> set[int]:
    return {i for i in range(5) if spans.covers(block_span(i, SIZE, BLOCK))}


def open_descriptors() -> int:
    return len(list(Path("/dev/fd").iterdir()))


class TestRoundTrips:
    def test_a_published_blob_is_an_ordinary_read_only_file_named_by_its_hash(self, store: BlobStore, root: Path) -> None:
        """P9; and nothing of the partial one is left."""
        path = publish(store)
        assert path.relative_to(root) == Path("blobs/sha256", BLOB.hex[:2], BLOB.hex[2:4], BLOB.hex)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
        assert path.stat().st_mode & 0o777 == 0o444
        assert list((root / "partial").iterdir()) == []

    def test_descriptors_stay_good_when_a_blob_is_published_and_when_it_is_removed(self, store: BlobStore) -> None:
        fill(store)
        partial = store.open_partial(BLOB, SIZE)
        store.publish(partial)
        fd = store.open_complete(BLOB)
        assert fd is not None
        store.remove(BLOB)
        assert os.pread(partial.fd, SIZE, 0) == os.pread(fd, SIZE, 0) == CONTENT
        assert store.open_complete(BLOB) is None
        store.close(partial)
        os.close(fd)

    def test_what_was_committed_is_there_for_the_next_process_and_what_was_written_is_not(
        self, store: BlobStore, root: Path
    ) -> None:
        fill(store, range(1, 3))
        partial = store.open_partial(BLOB, SIZE)
        store.write(partial, 0, [CONTENT[:BLOCK]])
        store.close(partial)
        after = BlobStore(root, block=BLOCK)
        assert after.recover() == [BLOB]
        assert durable(after) == SpanSet([Span(4, 12)])

    def test_a_short_last_block_is_a_block(self, store: BlobStore) -> None:
        fill(store, range(4, 5))
        assert durable(store) == SpanSet([Span(16, 17)])

    def test_an_empty_blob_can_be_published(self, store: BlobStore) -> None:
        empty = BlobId(Algo.SHA1, "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391")
        partial = store.open_partial(empty, 0)
        store.publish(partial)
        store.close(partial)
        fd = store.open_complete(empty)
        assert fd is not None and os.fstat(fd).st_size == 0
        os.close(fd)

    @pytest.mark.parametrize(("size", "block"), [(SIZE + 1, BLOCK), (SIZE - 1, BLOCK), (SIZE, 2 * BLOCK)])
    def test_a_partial_blob_of_another_size_or_block_is_begun_anew(
        self, store: BlobStore, root: Path, size: int, block: int
    ) -> None:
        fill(store)
        partial = BlobStore(root, block=block).open_partial(BLOB, size)
        assert not partial.durable
        assert os.fstat(partial.fd).st_size == size
        store.close(partial)

    def test_a_map_made_with_another_block_size_is_not_believed_even_when_it_has_as_many_blocks(self, root: Path) -> None:
        """Its first block had 12 bytes; read as one of 16, it would vouch for 4 that nobody committed."""
        before = BlobStore(root, block=12)
        partial = before.open_partial(BLOB, SIZE)
        before.write(partial, 0, [CONTENT[:12]])
        before.commit(partial, [0])
        before.close(partial)
        assert not durable(BlobStore(root, block=16))

    def test_recovery_drops_what_cannot_be_continued_and_keeps_what_can(self, store: BlobStore, root: Path) -> None:
        """Strange names, plain files, links, half-made ones, and a partial of what is complete."""
        fill(store, range(2))
        other = BlobId(Algo.SHA256, "a" * 64)
        store.close(store.open_partial(other, 3))
        store.path_of(other).parent.mkdir(parents=True)
        store.path_of(other).write_bytes(b"abc")
        (root / "partial" / f"sha1-{'b' * 64}").mkdir()
        (root / "partial" / f"sha1-{'b' * 40}").mkdir()
        (root / "partial" / ".DS_Store").write_bytes(b"x")
        (root / "partial" / f"sha256-{'c' * 64}").write_bytes(b"a file")
        (root / "partial" / f"sha256-{'d' * 64}").symlink_to(directory(root))
        assert store.recover() == [BLOB]
        assert [path.name for path in (root / "partial").iterdir()] == [str(BLOB)]
        assert durable(store) == SpanSet([Span(0, 8)])


class TestDamage:
    @pytest.mark.parametrize("committed", [range(0), range(2, 3), range(5)])
    def test_a_presence_map_torn_anywhere_believes_nothing_that_was_not_committed(
        self, store: BlobStore, root: Path, committed: range
    ) -> None:
        """Every length from 0 to all of it but a byte, and grown by one."""
        fill(store, committed)
        whole = (directory(root) / "present").read_bytes()
        for length in [*range(len(whole)), len(whole) + 1]:
            (directory(root) / "present").write_bytes((whole + b"\xa5")[:length])
            assert store.recover() == [], length
            fill(store, committed)

    @pytest.mark.parametrize("committed", [range(0), range(2, 3), range(5)])
    def test_no_damaged_byte_of_a_presence_map_makes_an_absent_block_present(
        self, store: BlobStore, root: Path, committed: range
    ) -> None:
        """Every byte of it, every other value: what was committed, some of it, or nothing is believed, and never more."""
        fill(store, committed)
        whole = (directory(root) / "present").read_bytes()
        for at in range(len(whole)):
            for value in range(256):
                try:
                    _, spans = _read_present(whole[:at] + bytes([value]) + whole[at + 1 :], BLOCK)
                except ValueError:
                    continue
                believed = blocks_of(spans)
                assert believed <= set(committed), (at, value)
                assert len(believed) >= len(committed) - 1

    def test_a_damaged_mark_costs_its_block_and_no_other(self, store: BlobStore, root: Path) -> None:
        fill(store)
        path = directory(root) / "present"
        raw = bytearray(path.read_bytes())
        raw[-2 * 3] ^= 1
        path.write_bytes(raw)
        assert store.recover() == [BLOB]
        assert durable(store) == SpanSet([Span(0, 8), Span(12, 17)])
        fill(store, range(2, 3))
        assert durable(store) == SpanSet([Span(0, SIZE)])

    @pytest.mark.parametrize("size", [0, SIZE - 1, SIZE + 1])
    def test_data_of_another_length_is_not_believed(self, store: BlobStore, root: Path, size: int) -> None:
        fill(store)
        os.truncate(directory(root) / "data", size)
        assert not durable(store)
        fill(store)
        os.truncate(directory(root) / "data", size)
        assert store.recover() == []

    def test_too_many_open_files_is_no_reason_to_throw_a_partial_blob_away(self, store: BlobStore) -> None:
        """Nor is any other error of the system: the bytes are good."""
        fill(store)

        class Exhausted(Disk):
            def open_read(self, path: Path) -> int:
                raise OSError(errno.EMFILE, "Too many open files")

            def open_data(self, path: Path, *, create: bool) -> int:
                raise OSError(errno.EMFILE, "Too many open files")

        store.disk = Exhausted()
        with pytest.raises(StoreFailed, match="Too many open files"):
            store.open_partial(BLOB, SIZE)
        store.disk = Disk()
        assert durable(store) == SpanSet([Span(0, SIZE)])

    @pytest.mark.parametrize("fails", ["truncate", "write_at", "open_data"])
    def test_a_full_disk_leaks_no_descriptor(self, store: BlobStore, fails: str) -> None:
        """Else a full disk becomes a mirror that cannot open anything."""

        class Full(Disk):
            opened = 0

            def open_data(self, path: Path, *, create: bool) -> int:
                self.opened += 1
                if fails == "open_data" and self.opened % 2 == 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return super().open_data(path, create=create)

        def full(*_: object) -> None:
            raise StoreFailed("the disk is full")

        store.disk = Full()
        if fails != "open_data":
            setattr(store.disk, fails, full)
        before = open_descriptors()
        for _ in range(3):
            with pytest.raises(StoreFailed):
                store.open_partial(BLOB, SIZE)
        assert open_descriptors() == before
        store.disk = Disk()
        store.close(store.open_partial(BLOB, SIZE))


class TestPlanted:
    @pytest.mark.parametrize("name", ["data", "present", "readers"])
    @pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
    def test_what_is_no_file_of_ours_in_a_partial_blob_is_refused(
        self, store: BlobStore, root: Path, tmp_path_factory: pytest.TempPathFactory, name: str, kind: str
    ) -> None:
        """The partial blob is begun anew; a link's target is neither believed, written to nor removed."""
        fill(store)
        victim = tmp_path_factory.mktemp("elsewhere") / "victim"
        planted = directory(root) / name
        if planted.exists():
            planted.rename(victim)
        else:
            victim.write_bytes(b"10.0.0.1\n")
        before = victim.read_bytes()
        if kind == "link":
            planted.symlink_to(victim)
        elif kind == "fifo":
            os.mkfifo(planted)
        else:
            planted.mkdir()
        partial = store.open_partial(BLOB, SIZE)
        assert not partial.durable and not partial.readers
        store.write(partial, 0, [b"????"])
        store.commit(partial, [0])
        store.note_reader(partial, "10.0.0.9")
        store.close(partial)
        assert victim.read_bytes() == before

    def test_a_linked_partial_directory_is_not_followed(
        self, store: BlobStore, root: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        fill(store)
        victim = tmp_path_factory.mktemp("elsewhere") / "victim"
        directory(root).rename(victim)
        for use in (lambda: store.recover(), lambda: fill(store, range(1))):
            directory(root).symlink_to(victim)
            use()
            assert sorted(path.name for path in victim.iterdir()) == ["data", "present"]
            assert (victim / "data").read_bytes() == CONTENT
            assert not directory(root).is_symlink()

    @pytest.mark.parametrize("plant", [lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir(), os.mkfifo])
    def test_what_is_no_file_in_place_of_a_complete_blob_is_refused(
        self, store: BlobStore, plant: Callable[[Path], object]
    ) -> None:
        path = store.path_of(BLOB)
        path.parent.mkdir(parents=True)
        plant(path)
        with pytest.raises((StoreFailed, IsADirectoryError)):
            store.open_complete(BLOB)

    def test_a_reader_is_not_appended_to_a_planted_link(self, store: BlobStore, root: Path, tmp_path: Path) -> None:
        partial = store.open_partial(BLOB, SIZE)
        (tmp_path / "victim").write_bytes(b"")
        (directory(root) / "readers").symlink_to(tmp_path / "victim")
        with pytest.raises(StoreFailed):
            store.note_reader(partial, "10.0.0.1")
        store.close(partial)
        assert (tmp_path / "victim").read_bytes() == b""
        assert not partial.readers


class TestReaders:
    def test_readers_are_known_to_the_next_process(self, store: BlobStore, root: Path) -> None:
        partial = store.open_partial(BLOB, SIZE)
        for address in ("10.0.0.1", "fd00::1", "10.0.0.1"):
            store.note_reader(partial, address)
        store.close(partial)
        partial = BlobStore(root, block=BLOCK).open_partial(BLOB, SIZE)
        assert partial.readers == {"10.0.0.1", "fd00::1"}
        store.close(partial)

    def test_a_torn_line_swallows_no_later_reader(self, store: BlobStore, root: Path) -> None:
        """A power cut in the middle of a line, or zeros in its place; then the next one is noted."""
        for torn in (b"\n10.0.0", b"\n\0\0\0\0", b"\n10.0.0.7\n\xff"):
            partial = store.open_partial(BLOB, SIZE)
            store.close(partial)
            (directory(root) / "readers").write_bytes(torn)
            partial = store.open_partial(BLOB, SIZE)
            store.note_reader(partial, "10.0.0.1")
            store.close(partial)
            partial = store.open_partial(BLOB, SIZE)
            assert "10.0.0.1" in partial.readers
            store.close(partial)

    def test_one_that_could_not_be_recorded_is_tried_again(self, store: BlobStore) -> None:
        """The bytes must not leave on the strength of a record that failed."""
        partial = store.open_partial(BLOB, SIZE)

        class Failing(Disk):
            def sync_data(self, fd: int) -> None:
                raise StoreFailed("EIO")

        store.disk = Failing()
        for _ in range(2):
            with pytest.raises(StoreFailed):
                store.note_reader(partial, "10.0.0.1")
        store.disk = Disk()
        store.note_reader(partial, "10.0.0.1")
        assert partial.readers == {"10.0.0.1"}
        store.close(partial)

    def test_an_address_cannot_write_two_lines(self, store: BlobStore) -> None:
        partial = store.open_partial(BLOB, SIZE)
        store.note_reader(partial, "10.0.0.1\n10.0.0.2")
        store.close(partial)
        partial = store.open_partial(BLOB, SIZE)
        assert partial.readers == {"10.0.0.110.0.0.2"}
        store.close(partial)


class TestQuarantine:
    def test_what_failed_is_out_of_reach_and_remembered_with_all_who_read_it(self, store: BlobStore, root: Path) -> None:
        """Those that the fill names, those noted on disk, and those of the failure before."""
        partial = store.open_partial(BLOB, SIZE)
        store.note_reader(partial, "noted")
        store.close(partial)
        quarantine(store, "first")
        assert store.open_complete(BLOB) is None and not durable(store)
        quarantine(store, "second")
        for witness in (store, BlobStore(root, block=BLOCK, clock=store.clock)):
            witness.recover()
            mismatch = witness.mismatch(BLOB)
            assert mismatch is not None and mismatch.count == 2
            assert mismatch.readers == {"noted", "first", "second"}
        assert (root / "quarantine" / str(BLOB) / "data").read_bytes() == b"?" * SIZE

    def test_dying_before_the_bytes_moved_recovery_moves_them(self, store: BlobStore, root: Path) -> None:
        """The record lies beside them already; it is counted once."""
        quarantine(store, "a reader")
        (root / "quarantine" / str(BLOB)).rename(directory(root))
        after = BlobStore(root, block=BLOCK, clock=store.clock)
        assert after.recover() == []
        mismatch = after.mismatch(BLOB)
        assert mismatch is not None and (mismatch.count, mismatch.readers) == (1, {"a reader"})
        assert not directory(root).exists()

    def test_it_is_forgotten_after_a_day_and_not_before(self, store: BlobStore, root: Path, clock: Clock) -> None:
        """Also when the clock is set back; after a day the bytes go too."""
        quarantine(store, "a reader")
        for passed_s, is_known in ((-1e6, True), (MISMATCH_MEMORY_S, True), (MISMATCH_MEMORY_S + 1, False)):
            clock.now = 1e9 + passed_s
            again = BlobStore(root, block=BLOCK, clock=clock)
            again.recover()
            assert (again.mismatch(BLOB) is not None) == is_known
        assert store.mismatch(BLOB) is None
        assert list((root / "quarantine").iterdir()) == []

    def test_the_right_bytes_published_later_free_the_space_and_keep_the_record(self, store: BlobStore, root: Path) -> None:
        quarantine(store, "a reader")
        publish(store)
        store.recover()
        assert store.mismatch(BLOB) is not None
        assert [path.name for path in (root / "quarantine" / str(BLOB)).iterdir()] == ["mismatch.json"]

    @pytest.mark.parametrize(
        "record",
        [
            b"",
            b"{",
            b"[]",
            b"null",
            b"{}",
            b'{"at": "x", "count": 1, "readers": []}',
            b'{"at": 1, "count": 1, "readers": 1}',
            b"\xff",
        ],
    )
    def test_a_damaged_record_does_not_keep_the_mirror_from_starting(self, store: BlobStore, root: Path, record: bytes) -> None:
        quarantine(store, "a reader")
        (root / "quarantine" / str(BLOB) / "mismatch.json").write_bytes(record)
        (root / "quarantine" / "stray").write_bytes(b"x")
        after = BlobStore(root, block=BLOCK, clock=store.clock)
        assert after.recover() == []
        assert after.mismatch(BLOB) is None

    def test_the_record_is_plain_json(self, store: BlobStore, root: Path) -> None:
        quarantine(store, "b", "a")
        record = json.loads((root / "quarantine" / str(BLOB) / "mismatch.json").read_text())
        assert record == {"at": 1e9, "count": 1, "readers": ["a", "b"]}


def test_removing_a_blob_removes_both_its_forms(store: BlobStore, root: Path) -> None:
    path = publish(store)
    store.remove(BLOB)
    assert not path.exists()
    fill(store, range(1))
    store.remove(BLOB)
    store.remove(BLOB)
    assert not directory(root).exists()
