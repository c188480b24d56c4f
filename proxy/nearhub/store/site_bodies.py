"""Bodies of stored answers of sites: plain files with names of no meaning; what they are is a row of the index.

    sites/ab/<32 hex>        complete and synced before it has this name
    sites/new-<32 hex>       being written; what a crash leaves of these is removed at start

A file without a row is never read, and leaves as the least recently used do; a row without its file is a miss.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nearhub.store.blobs import USED_EVERY_S, Held, size_on_disk
from nearhub.store.disk import Disk


@dataclass(frozen=True, slots=True, order=True)
class SiteBody:
    """One body, by its name on disk."""

    name: str

    def __str__(self) -> str:
        return f"site body {self.name}"


class NewBody:
    """One that is being written. End it by keep() or drop(). Blocks."""

    def __init__(self, body: SiteBody, path: Path, target: Path, disk: Disk) -> None:
        self.body = body
        self.size = 0
        self._path = path
        self._target = target
        self._disk = disk
        self._fd = disk.open_data(path, create=True)

    def write(self, data: bytes) -> None:
        """Raises StoreFailed."""
        self._disk.write_at(self._fd, [data], self.size)
        self.size += len(data)

    def keep(self) -> None:
        """Durable under its name on return. Raises StoreFailed."""
        self._disk.sync_data(self._fd)
        self._disk.make_dirs(self._target.parent)
        self._disk.rename(self._path, self._target)
        self._disk.sync_dir(self._target.parent)
        os.close(self._fd)

    def drop(self) -> None:
        os.close(self._fd)
        self._disk.unlink(self._path)


class SiteBodies:
    """The files below `root`. Blocks."""

    def __init__(self, root: Path, disk: Disk | None = None) -> None:
        self._root = root
        self._disk = disk or Disk()

    def recover(self) -> None:
        for path in self._root.glob("new-*"):
            self._disk.unlink(path)

    def begin(self, body: SiteBody) -> NewBody:
        self._disk.make_dirs(self._root)
        return NewBody(body, self._root / f"new-{body.name}", self.path_of(body), self._disk)

    @staticmethod
    def new_name() -> SiteBody:
        return SiteBody(uuid.uuid4().hex)

    def path_of(self, body: SiteBody) -> Path:
        return self._root / body.name[:2] / body.name

    def open(self, body: SiteBody, size: int) -> int | None:
        """A descriptor, to be closed by the caller; None when it is gone, or is not of this size. Notes its use."""
        try:
            fd = self._disk.open_read(self.path_of(body))
        except OSError:
            return None
        info, now = os.fstat(fd), time.time()
        if info.st_size != size:
            os.close(fd)
            return None
        if abs(now - info.st_atime) > USED_EVERY_S:
            with suppress(OSError):
                os.utime(fd, ns=(int(now * 1e9), info.st_mtime_ns))
        return fd

    def held(self, body: SiteBody) -> Held:
        """Bytes on disk."""
        try:
            return Held(size_on_disk(self.path_of(body).lstat()), 0)
        except FileNotFoundError:
            return Held(0, 0)

    def scan(self) -> Iterator[tuple[SiteBody, int, float]]:
        """Every body, its bytes on disk and when it was last used."""
        for path in self._root.glob("??/*"):
            with suppress(FileNotFoundError):
                info = path.lstat()
                yield SiteBody(path.name), size_on_disk(info), info.st_atime

    def remove(self, body: SiteBody) -> None:
        """Who reads it has it open."""
        self._disk.unlink(self.path_of(body))
