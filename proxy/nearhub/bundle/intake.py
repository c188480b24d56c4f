"""Intake: bytes from elsewhere into the store. Written aside, hashed, and a blob only when the hash is its name."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Protocol

from nearhub.bundle.parts import PIECE
from nearhub.digest import BlobHash
from nearhub.errors import BundleRefused
from nearhub.store.blobs import BlobStore, Incoming
from nearhub.store.holdings import Import
from nearhub.tasks import uncancelled
from nearhub.wire.headers import BlobId

Read = Callable[[int, int], bytes]
"""Some bytes from a position on, at most so many and at least one."""
SMALL = 1024**2
"""A blob of no more bytes is read whole, and brought together with others: so many, of so many bytes in all."""
BATCH, BATCH_BYTES = 256, 16 * 1024**2
SYNCS = 16
_FICLONE = 0x40049409


class Room(Protocol):
    """What of Space an import needs."""

    async def admit(self, what: Import, size: int) -> bool: ...
    async def arrived(self, blob: BlobId, of: Import) -> None: ...
    async def settle(self, what: Import) -> None: ...


class Intake:
    """`room` None: nobody else uses the cache, and only the disk's end is one. One blob after the other."""

    def __init__(self, store: BlobStore, room: Room | None) -> None:
        self.store = store
        self.room = room
        self._hasher = ThreadPoolExecutor(1, "nearhub-import-hash")
        self._syncer = ThreadPoolExecutor(SYNCS, "nearhub-import-sync")
        self._is_over = False

    def has(self, blob: BlobId) -> bool:
        return self.store.path_of(blob).exists()

    async def take(self, blob: BlobId, size: int, read: Read, of: Import) -> bool:
        """Bring a blob by `read`. False: the bytes are not it, and nothing was kept."""
        is_right = await uncancelled(asyncio.to_thread(self._take, blob, size, read), self._end)
        if is_right and self.room is not None:
            await self.room.arrived(blob, of)
        return is_right

    async def take_small(self, blobs: Mapping[BlobId, bytes], of: Import) -> set[BlobId]:
        """Bring many small blobs at once, whose bytes are here. Returns those that are not what they are called."""
        wrong = await uncancelled(asyncio.to_thread(self._take_small, blobs))
        if self.room is not None:
            for blob in blobs.keys() - wrong:
                await self.room.arrived(blob, of)
        return wrong

    async def clone(self, blob: BlobId, fd: int, of: Import) -> bool:
        """As take(), of a file: its blocks are shared where the file system can do that, and hashed as we hold them."""
        size = os.fstat(fd).st_size
        is_right = await uncancelled(asyncio.to_thread(self._clone, blob, size, fd), self._end)
        if is_right and self.room is not None:
            await self.room.arrived(blob, of)
        return is_right

    def _take(self, blob: BlobId, size: int, read: Read) -> bool:
        with self.store.incoming(str(blob)) as incoming:
            digest = BlobHash(blob, size)
            self._fill(incoming, size, read, digest)
            if not digest.matches():
                return False
            self._keep(incoming, blob)
            return True

    def _take_small(self, blobs: Mapping[BlobId, bytes]) -> set[BlobId]:
        wrong = set()
        with ExitStack() as stack:
            written = []
            for blob, data in blobs.items():
                digest = BlobHash(blob, len(data))
                digest.update(data)
                if not digest.matches():
                    wrong.add(blob)
                    continue
                incoming = stack.enter_context(self.store.incoming(str(blob)))
                self.store.disk.write_at(incoming.fd, [data], 0)
                written.append((incoming, blob))
            # Side by side, so that the file system commits them together.
            list(self._syncer.map(lambda one: self.store.seal(one[0]), written))
            self.store.adopt(written, self._syncer)
        return wrong

    def _keep(self, incoming: Incoming, blob: BlobId) -> None:
        self.store.seal(incoming)
        self.store.adopt([(incoming, blob)])

    def _fill(self, incoming: Incoming, size: int, read: Read, digest: BlobHash) -> None:
        """Hashing one piece, and reading and writing the next, go on beside one another."""
        hashing: Future[None] | None = None
        position = 0
        while position < size:
            if self._is_over:
                raise BundleRefused("the import was ended")
            data = read(position, min(PIECE, size - position))
            self.store.disk.write_at(incoming.fd, [data], position)
            position += len(data)
            if size <= PIECE:
                digest.update(data)
                continue
            if hashing is not None:
                hashing.result()
            hashing = self._hasher.submit(digest.update, data)
        if hashing is not None:
            hashing.result()

    def _clone(self, blob: BlobId, size: int, fd: int) -> bool:
        with self.store.incoming(str(blob)) as incoming:
            digest = BlobHash(blob, size)
            if _shares(fd, incoming.fd):
                if os.fstat(incoming.fd).st_size != size:
                    return False
                digest.read(incoming.fd, size)
            else:

                def read(position: int, most: int) -> bytes:
                    return os.pread(fd, most, position) or b"\0"  # cut short meanwhile: the hash says so

                self._fill(incoming, size, read, digest)
            if not digest.matches():
                return False
            self._keep(incoming, blob)
            return True

    def _end(self) -> None:
        self._is_over = True

    def close(self) -> None:
        self._hasher.shutdown()
        self._syncer.shutdown()


def _shares(source: int, target: int) -> bool:
    """Whether `target` now shares the blocks of `source`. Never a hard link: ours must not change when theirs does."""
    with suppress(OSError):
        fcntl.ioctl(target, _FICLONE, source)
        return True
    return False
