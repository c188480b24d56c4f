"""BlobStore: complete blobs are plain files named by their hash, partial ones a sparse file and a presence map.

    blobs/sha256/ab/cd/<64 hex>          complete, verified, 0444
    blobs/sha1/ab/cd/<40 hex>
    partial/<algo>-<hex>/data            sparse, of the blob's full size
                         present         header, then two bytes a block: a mark = its bytes were synced before this was written
                         readers         addresses that read much of it before it was verified (P1b)
    quarantine/<algo>-<hex>/mismatch.json  when it failed verification, and who had read it; beside it the bytes
    incoming/<name>                        what an import is reading, until it is verified; emptied at start

Everything here blocks (callers use threads) and is safe for calls on different blobs at once; for one blob the fill engine is
the only writer of partial/. Verification is the fill's, or the import's; this file never hashes.
When a blob was last used is the access time of its file, set here at most once an hour: no index is written to read a blob.
A crash at any point: a presence byte is written only after an fdatasync of what it speaks for: what recovery believes is true.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from nearhub.errors import StoreFailed, StoreFull
from nearhub.store.disk import Disk, failure
from nearhub.wire.headers import Algo, BlobId
from nearhub.wire.spans import BLOCK, SpanSet, block_count, block_span

log = logging.getLogger(__name__)

MISMATCH_MEMORY_S = 24 * 3600.0
"""How long a failed verification makes resumed downloads suspect (P1b)."""

USED_EVERY_S = 3600.0
"""A blob's access time is not written more often than this: the order of use is exact to the hour after a restart."""

_HEADER = struct.Struct("<4sHxxIQI")  # magic, version, block, size, crc32 of the fields before it
_MAGIC = b"nhpm"
_MARK = b"\xa5\x5a"  # two bytes, so that no single damaged byte makes an absent block present
_RECORD = "mismatch.json"


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Bytes of a blob that failed verification. `at` is wall-clock seconds; `count` of failures within 24 h."""

    at: float
    count: int
    readers: frozenset[str]


class Held(NamedTuple):
    """Bytes on disk that the store holds of one blob."""

    bytes: int
    """Complete or partial; a partial one counts what is allocated to it."""
    aside: int
    """In quarantine."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """A file that an import writes to, and reads back."""

    fd: int
    path: Path


@dataclass(slots=True)
class Partial:
    """An open partial blob. `durable` is what survives a crash; what is merely written is the fill's knowledge."""

    blob: BlobId
    size: int
    fd: int
    durable: SpanSet
    readers: set[str]
    _path: Path
    _present_fd: int
    _named: bool
    """Whether the directory entries are known to be durable."""

    def __repr__(self) -> str:
        return f"<Partial {self.blob} {self.durable.count()}/{self.size}>"


@dataclass(slots=True)
class BlobStore:
    """Owner of blobs/, partial/ and quarantine/ below `root`."""

    root: Path
    block: int = BLOCK
    clock: Callable[[], float] = time.time
    disk: Disk = field(default_factory=Disk)
    _mismatches: dict[BlobId, Mismatch] = field(default_factory=dict)

    # — at start ————————————————————————————————————————————————————————————————————————————————

    def recover(self) -> list[BlobId]:
        """Clean up after a crash; returns the partial blobs that can be continued."""
        kept = []
        for entry in sorted((self.root / "partial").iterdir()):
            blob = _parse_name(entry.name)
            if blob is not None and not entry.is_symlink() and (entry / _RECORD).exists():
                self._condemn(entry, blob)
            elif blob is None or self.path_of(blob).exists() or not self._is_sound(entry):
                log.info("recovery: dropped %s", entry.name)
                self._drop_partial(entry)
            else:
                kept.append(blob)
        for entry in (self.root / "quarantine").iterdir():
            self._load_mismatch(entry)
        self.disk.remove_tree(self.root / "incoming")
        return kept

    def _is_sound(self, directory: Path) -> bool:
        try:
            size, _ = self._present(directory)
            return (directory / "data").lstat().st_size == size
        except (OSError, ValueError, StoreFailed):
            return False

    def _present(self, directory: Path) -> tuple[int, SpanSet]:
        if directory.is_symlink():
            raise ValueError("it is a link that somebody planted")
        return _read_present(self._read(directory / "present"), self.block)

    def _read(self, path: Path) -> bytes:
        with os.fdopen(self.disk.open_read(path), "rb") as file:
            return file.read()

    # — complete blobs ——————————————————————————————————————————————————————————————————————————

    def path_of(self, blob: BlobId) -> Path:
        return self.root / "blobs" / blob.algo / blob.hex[:2] / blob.hex[2:4] / blob.hex

    def open_complete(self, blob: BlobId) -> int | None:
        """A read descriptor of the complete blob, which counts as used now, or None. The caller closes it; eviction never
        breaks it."""
        try:
            fd = self.disk.open_read(self.path_of(blob))
        except FileNotFoundError:
            return None
        self._note_use(fd)
        return fd

    def _note_use(self, fd: int) -> None:
        info, now = os.fstat(fd), self.clock()
        if abs(now - info.st_atime) > USED_EVERY_S:
            with contextlib.suppress(OSError):  # a read-only file system: the order is then lost with the process
                os.utime(fd, ns=(int(now * 1e9), info.st_mtime_ns))

    @contextlib.contextmanager
    def incoming(self, name: str) -> Iterator[Incoming]:
        """An empty file for bytes that do not come from upstream; gone at the end of the context unless it was adopted.

        Apart from partial/, so that a fill of the same blob goes on beside it: whoever is ready first, it is the same file.
        """
        path = self.root / "incoming" / name
        self.disk.make_dirs(path.parent)
        self.disk.unlink(path)
        try:
            fd = self.disk.open_data(path, create=True)
        except OSError as exc:
            raise failure(exc, "create") from exc
        try:
            yield Incoming(fd, path)
        finally:
            os.close(fd)
            self.disk.unlink(path)

    def seal(self, incoming: Incoming) -> None:
        """Its bytes are written and verified: durable on return."""
        os.fchmod(incoming.fd, 0o444)
        self.disk.sync_file(incoming.fd)

    def adopt(self, sealed: Iterable[tuple[Incoming, BlobId]], pool: Executor | None = None) -> None:
        """They become complete blobs, durable on return. `pool`: syncs the directories side by side, so that the file system
        commits them together."""
        changed: dict[Path, None] = {}
        for incoming, blob in sealed:
            target = self.path_of(blob)
            for directory in (target.parent.parent, target.parent):
                if not directory.is_dir():
                    self.disk.make_dir(directory)
                    changed[directory.parent] = None
            self.disk.rename(incoming.path, target)
            changed[target.parent] = None
            self._drop_condemned(blob)
        list((map if pool is None else pool.map)(self.disk.sync_dir, changed))

    # — partial blobs ———————————————————————————————————————————————————————————————————————————

    def open_partial(self, blob: BlobId, size: int) -> Partial:
        """Continue the partial blob on disk, or begin one. Of another size, block size or shape: it is begun anew."""
        directory = self.root / "partial" / str(blob)
        try:
            return self._load_partial(blob, size, directory)
        except FileNotFoundError:
            pass
        except (ValueError, StoreFailed, NotADirectoryError, IsADirectoryError) as exc:
            log.warning("partial %s cannot be continued (%s): begun anew", blob, exc)
        except OSError as exc:  # too many open files, EIO: no reason to throw away what is there
            raise failure(exc, "open") from exc
        self._drop_partial(directory)
        return self._create_partial(blob, size, directory)

    def _load_partial(self, blob: BlobId, size: int, directory: Path) -> Partial:
        known_size, durable = self._present(directory)
        if known_size != size or (directory / "data").lstat().st_size != size:
            raise ValueError(f"its size is {known_size}, the blob's is {size}")
        try:
            readers = set(self._read(directory / "readers").decode("utf-8", "replace").split("\n")) - {""}
        except FileNotFoundError:
            readers = set()
        fd, present_fd = self._open_both(directory, create=False)
        # An earlier fill may have left before its first commit: nothing says that its names were ever synced.
        return Partial(blob, size, fd, durable, readers, directory, present_fd, _named=False)

    def _create_partial(self, blob: BlobId, size: int, directory: Path) -> Partial:
        try:
            directory.mkdir(mode=0o700)
            fd, present_fd = self._open_both(directory, create=True)
        except OSError as exc:
            raise failure(exc, "create") from exc
        try:
            self.disk.truncate(fd, size)
            empty = bytes(len(_MARK) * block_count(size, self.block))
            self.disk.write_at(present_fd, [_present_header(size, self.block) + empty], 0)
        except BaseException:
            os.close(fd)
            os.close(present_fd)
            raise
        # Nothing is synced yet, so that a cold file's first byte does not wait for the disk: the first commit does it.
        return Partial(blob, size, fd, SpanSet(), set(), directory, present_fd, _named=False)

    def _open_both(self, directory: Path, *, create: bool) -> tuple[int, int]:
        fd = self.disk.open_data(directory / "data", create=create)
        try:
            return fd, self.disk.open_data(directory / "present", create=create)
        except BaseException:
            os.close(fd)
            raise

    def write(self, partial: Partial, offset: int, buffers: Sequence[bytes | memoryview]) -> None:
        """Bytes into the file; visible to readers of this process, not yet durable."""
        self.disk.write_at(partial.fd, buffers, offset)

    def commit(self, partial: Partial, blocks: Iterable[int]) -> None:
        """Make whole, written blocks durable, then mark them. Dying in between costs a refetch of them, no more."""
        self.disk.sync_data(partial.fd)
        if not partial._named:
            self._name(partial)
        for index in blocks:
            self._mark(partial, index)
            partial.durable.add(block_span(index, partial.size, self.block))
        self.disk.sync_data(partial._present_fd)

    def _mark(self, partial: Partial, index: int) -> None:
        self.disk.write_at(partial._present_fd, [_MARK], _HEADER.size + len(_MARK) * index)

    def _name(self, partial: Partial) -> None:
        self.disk.sync_file(partial.fd)
        self.disk.sync_file(partial._present_fd)
        self.disk.sync_dir(partial._path)
        self.disk.sync_dir(partial._path.parent)
        partial._named = True

    def note_reader(self, partial: Partial, address: str) -> None:
        """Record, durably and before the bytes leave, that `address` reads much of this blob unverified."""
        if address in partial.readers:
            return
        # A line break first: a line that was torn by a power cut must not swallow this one.
        line = b"\n" + address.encode("utf-8", "replace").replace(b"\n", b"") + b"\n"
        try:
            fd = os.open(
                partial._path / "readers", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
            )
            try:
                os.write(fd, line)
                self.disk.sync_data(fd)
            finally:
                os.close(fd)
        except OSError as exc:
            raise failure(exc, "record a reader in") from exc
        if not partial._named:
            self._name(partial)
        else:
            self.disk.sync_dir(partial._path)
        partial.readers.add(address)

    def publish(self, partial: Partial) -> None:
        """The verified partial blob becomes a complete one. Its descriptors stay open and valid."""
        target = self.path_of(partial.blob)
        self.disk.make_dirs(target.parent)
        os.fchmod(partial.fd, 0o444)
        self.disk.sync_file(partial.fd)
        self.disk.rename(partial._path / "data", target)
        self.disk.sync_dir(target.parent)
        self._drop_partial(partial._path)
        self._drop_condemned(partial.blob)

    def close(self, partial: Partial) -> None:
        """Give up the descriptors; on disk nothing changes."""
        os.close(partial.fd)
        os.close(partial._present_fd)

    def _drop_partial(self, directory: Path) -> None:
        # The map goes first: data without a map is dropped by recovery, a map without data must never be believed.
        if not directory.is_symlink():
            self.disk.unlink(directory / "present")
        self.disk.remove_tree(directory)

    def remove(self, blob: BlobId) -> None:
        """Forget a blob that no fill is bringing: complete, partial or in quarantine. Open descriptors stay readable, and
        the record of a failed verification stays."""
        self.disk.unlink(self.path_of(blob))
        self._drop_partial(self.root / "partial" / str(blob))
        self._drop_condemned(blob)

    # — what there is ———————————————————————————————————————————————————————————————————————————

    def held(self, blob: BlobId) -> Held:
        """What the disk holds of one blob."""
        complete = _size(self.path_of(blob), size_on_disk)
        partial = _size(self.root / "partial" / str(blob) / "data", allocated)
        return Held(complete + partial, _size(self.root / "quarantine" / str(blob) / "data", allocated))

    def scan(self) -> Iterator[tuple[BlobId, int, float]]:
        """(blob, bytes on disk, when it was last used, in wall-clock seconds) of everything that can be read. A blob that is in
        two places comes twice."""
        for algo in Algo:
            for outer in _scandir(f"{self.root}/blobs/{algo}"):
                for inner in _scandir(outer.path):
                    for entry in _scandir(inner.path):
                        blob = _parse_name(f"{algo}-{entry.name}")
                        info = _regular(entry)
                        if info and blob and (outer.name, inner.name) == (blob.hex[:2], blob.hex[2:4]):
                            yield blob, size_on_disk(info), max(info.st_atime, info.st_mtime)
        for place in ("partial", "quarantine"):
            for directory in _scandir(f"{self.root}/{place}"):
                blob = _parse_name(directory.name)
                for entry in _scandir(directory.path):
                    info = _regular(entry) if entry.name == "data" else None
                    if info and blob:
                        yield blob, allocated(info), max(info.st_atime, info.st_mtime)

    # — what failed verification ————————————————————————————————————————————————————————————————

    def mismatch(self, blob: BlobId) -> Mismatch | None:
        """The failure of this blob in the last 24 h, or None. In memory: cheap enough for every request."""
        known = self._mismatches.get(blob)
        if known is None:
            return None
        # A clock that was set back must not make us forget early: an age below 0 counts as 0.
        if self.clock() - known.at > MISMATCH_MEMORY_S:
            del self._mismatches[blob]
            return None
        return known

    def quarantine(self, partial: Partial, readers: Iterable[str]) -> Mismatch:
        """Record the failure durably, then take the bytes out of reach. Nothing may refetch the blob before this returns.

        On a full disk the bytes make room for their record; if there is none even then, only this process remembers it.
        """
        mismatch = self._remember(partial.blob, [*readers, *partial.readers])
        # The record goes in beside the bytes, and then both move at once: dying in between, recovery moves them.
        try:
            if not partial._named:
                self._name(partial)
            self.disk.write_file(partial._path / _RECORD, _record(mismatch))
            self._condemn(partial._path, partial.blob)
        except StoreFull:
            self._drop_partial(partial._path)
            self._write_record(partial.blob, mismatch)
        return mismatch

    def record_mismatch(self, blob: BlobId, readers: Iterable[str]) -> Mismatch:
        """As quarantine(), of bytes that were never stored. On a full disk only this process remembers it."""
        mismatch = self._remember(blob, readers)
        self._write_record(blob, mismatch)
        return mismatch

    def _remember(self, blob: BlobId, readers: Iterable[str]) -> Mismatch:
        before = self.mismatch(blob)
        everyone = frozenset(readers) | (before.readers if before else frozenset())
        mismatch = self._mismatches[blob] = Mismatch(self.clock(), 1 + (before.count if before else 0), everyone)
        return mismatch

    def _write_record(self, blob: BlobId, mismatch: Mismatch) -> None:
        target = self.root / "quarantine" / str(blob)
        try:
            self.disk.make_dirs(target)
            self.disk.write_file(target / _RECORD, _record(mismatch))
        except StoreFull as exc:
            log.warning("the failed verification of %s could not be recorded: %s", blob, exc)

    def _drop_condemned(self, blob: BlobId) -> None:
        for name in ("data", "present"):  # the record stays: clients may hold some of it for a day
            self.disk.unlink(self.root / "quarantine" / str(blob) / name)

    def _condemn(self, directory: Path, blob: BlobId) -> None:
        target = self.root / "quarantine" / str(blob)
        self.disk.remove_tree(target)
        self.disk.rename(directory, target)
        self.disk.sync_dir(target.parent)
        self.disk.sync_dir(directory.parent)

    def _load_mismatch(self, directory: Path) -> None:
        blob = _parse_name(directory.name)
        try:
            record = json.loads((directory / _RECORD).read_bytes())
            mismatch = Mismatch(float(record["at"]), int(record["count"]), frozenset(map(str, record["readers"])))
        except (OSError, ValueError, KeyError, TypeError) as exc:
            log.warning("quarantine record %s cannot be read: %s", directory.name, exc)
            return
        if blob is None or self.clock() - mismatch.at > MISMATCH_MEMORY_S:
            self.disk.remove_tree(directory)
        else:
            self._mismatches[blob] = mismatch


def size_on_disk(info: os.stat_result) -> int:
    """Bytes that a complete file takes: its size, or its blocks where those are more (a file of 10 bytes takes 4 KiB)."""
    return max(info.st_size, allocated(info))


def allocated(info: os.stat_result) -> int:
    """Bytes of the blocks that a file has; of a sparse one less than its size."""
    return info.st_blocks * 512  # POSIX leaves the unit open; Linux, macOS and the BSDs have 512


def _size(path: Path, measure: Callable[[os.stat_result], int]) -> int:
    try:
        info = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as exc:
        raise failure(exc, "look at") from exc
    return measure(info) if stat.S_ISREG(info.st_mode) else 0


def _scandir(path: str) -> list[os.DirEntry[str]]:
    """Nothing for what is no directory, or none any more."""
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as exc:
        log.warning("%s cannot be read, so what is in there is never evicted: %s", path, exc.strerror)
        return []


def _regular(entry: os.DirEntry[str]) -> os.stat_result | None:
    try:
        info = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    return info if stat.S_ISREG(info.st_mode) else None


def _record(mismatch: Mismatch) -> bytes:
    return json.dumps({"at": mismatch.at, "count": mismatch.count, "readers": sorted(mismatch.readers)}).encode()


def _parse_name(name: str) -> BlobId | None:
    algo, _, digest = name.partition("-")
    try:
        blob = BlobId.from_etag(digest)
    except ValueError:
        return None
    return blob if blob.algo == algo and algo in tuple(Algo) else None


def _present_header(size: int, block: int) -> bytes:
    fields = _HEADER.pack(_MAGIC, 2, block, size, 0)[:-4]
    return fields + struct.pack("<I", zlib.crc32(fields))


def _read_present(raw: bytes, block: int) -> tuple[int, SpanSet]:
    """(blob size, the bytes that are marked present). ValueError when it is torn or of another shape.

    What is no whole mark, torn or damaged, is none: it costs a refetch of that block.
    """
    if len(raw) < _HEADER.size:
        raise ValueError("its presence map is torn")
    size = int(_HEADER.unpack_from(raw)[3])
    if raw[: _HEADER.size] != _present_header(size, block):
        raise ValueError("its presence map is torn or has another block size")
    marks = [raw[at : at + len(_MARK)] for at in range(_HEADER.size, len(raw), len(_MARK))]
    if len(raw) != _HEADER.size + len(_MARK) * block_count(size, block):
        raise ValueError("its presence map does not fit the size")
    return size, SpanSet(block_span(i, size, block) for i, mark in enumerate(marks) if mark == _MARK)
