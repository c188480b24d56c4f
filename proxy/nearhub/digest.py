"""BlobHash: the hash that names a blob, taken bit by bit. Blocks: callers use a thread."""

from __future__ import annotations

import hashlib
import os

from nearhub.errors import StoreFailed
from nearhub.wire.headers import Algo, BlobId

_READ = 1024 * 1024


class BlobHash:
    """Of the first `position` bytes so far."""

    def __init__(self, blob: BlobId, size: int) -> None:
        self.position = 0
        self._blob = blob
        self._digest = hashlib.sha256() if blob.algo is Algo.SHA256 else hashlib.sha1(b"blob %d\0" % size)

    def __repr__(self) -> str:
        return f"<BlobHash of {self.position} bytes of {self._blob}>"

    def update(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self.position += len(data)

    def read(self, fd: int, stop: int) -> None:
        """Go on to `stop` with the bytes of a file."""
        while self.position < stop:
            data = os.pread(fd, min(stop - self.position, _READ), self.position)
            if not data:
                raise StoreFailed("a partial blob's file is shorter than it was")
            self.update(data)

    def copy(self) -> BlobHash:
        """As far as this one is; each goes on by itself. Nothing else may be at work on it."""
        other = BlobHash.__new__(BlobHash)
        other.position, other._blob, other._digest = self.position, self._blob, self._digest.copy()
        return other

    @property
    def hex(self) -> str:
        return self._digest.hexdigest()

    def matches(self) -> bool:
        """Whether what was hashed is the blob."""
        return self.hex == self._blob.hex
