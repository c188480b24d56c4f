"""The system calls of the store, in one place, and what "durable" means in terms of them. No knowledge of blobs.

All of it blocks: callers run it in threads. Tests pass a Disk that dies or fails at the n-th call.
Order of every write that must survive a power cut: bytes → fdatasync → name or mark → fsync of the directory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from nearhub.errors import StoreFailed, StoreFull

_sync_data = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync
_NOFOLLOW = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a planted FIFO must not keep us waiting; files do not care


class Disk:
    """Plain, durable file operations. OSError becomes StoreFailed where the disk is at fault."""

    def open_data(self, path: Path, *, create: bool) -> int:
        """A read-write descriptor of a regular file that belongs to us; a planted link or device is refused."""
        flags = os.O_RDWR | _NOFOLLOW | (os.O_CREAT | os.O_EXCL if create else 0)
        return self._regular(path, flags)

    def open_read(self, path: Path) -> int:
        return self._regular(path, os.O_RDONLY | _NOFOLLOW)

    def _regular(self, path: Path, flags: int) -> int:
        try:
            fd = os.open(path, flags, 0o600)
        except OSError as exc:
            if exc.errno == errno.ELOOP:
                raise StoreFailed(f"{path} is a link, not a regular file") from None
            raise
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise StoreFailed(f"{path} is not a regular file")
        return fd

    def write_at(self, fd: int, buffers: Sequence[bytes | memoryview], offset: int) -> None:
        """All of `buffers`, one after the other, from `offset`."""
        with _disk_errors("write"):
            views = [memoryview(b) for b in buffers]
            while views:
                written = os.pwritev(fd, views, offset)
                offset += written
                while views and written >= len(views[0]):
                    written -= len(views.pop(0))
                if written:
                    views[0] = views[0][written:]

    def truncate(self, fd: int, size: int) -> None:
        with _disk_errors("set the size of"):
            os.ftruncate(fd, size)

    def sync_data(self, fd: int) -> None:
        """After a failure the bytes must not be believed, even if a second sync succeeds."""
        with _disk_errors("sync"):
            _sync_data(fd)

    def sync_file(self, fd: int) -> None:
        with _disk_errors("sync"):
            os.fsync(fd)

    def sync_dir(self, path: Path) -> None:
        with _disk_errors("sync"):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        with _disk_errors("rename"):
            source.rename(target)

    def unlink(self, path: Path) -> None:
        """The file or link at `path`, if there is one; a directory stays."""
        with _disk_errors("remove"), contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            path.unlink()

    def remove_tree(self, path: Path) -> None:
        """Whatever is at `path`, if anything is. A link is removed, never followed."""
        with _disk_errors("remove"), contextlib.suppress(FileNotFoundError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def make_dirs(self, path: Path) -> None:
        """mkdir -p, each new level durable in its parent."""
        if path.is_dir():
            return
        self.make_dirs(path.parent)
        self.make_dir(path)
        self.sync_dir(path.parent)

    def make_dir(self, path: Path) -> None:
        """Not yet durable in its parent."""
        with _disk_errors("create"):
            path.mkdir(mode=0o700, exist_ok=True)

    def write_file(self, path: Path, data: bytes) -> None:
        """Replace `path` by `data`, whole or not at all, durable on return."""
        temporary = path.with_name(path.name + ".tmp")
        with _disk_errors("write"):
            temporary.unlink(missing_ok=True)
            fd = self._regular(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW)
            try:
                self.write_at(fd, [data], 0)
                self.sync_file(fd)
            finally:
                os.close(fd)
        self.rename(temporary, path)
        self.sync_dir(path.parent)


def failure(exc: OSError, verb: str) -> StoreFailed:
    """What the store raises for `exc`; StoreFull where room is what is missing."""
    message = f"the cache could not {verb} a file: "
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFull(message + "the disk is full")
    if exc.errno == errno.EFBIG:
        return StoreFull(message + "the file system takes none of this size")
    return StoreFailed(message + os.strerror(exc.errno or 0))


@contextlib.contextmanager
def _disk_errors(verb: str):  # type: ignore[no-untyped-def]
    try:
        yield
    except OSError as exc:
        raise failure(exc, verb) from exc
