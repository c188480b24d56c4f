"""Disks that die: at the n-th operation, and with everything lost that was not synced."""

from __future__ import annotations

import os
import random
import shutil
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nearhub.store.disk import Disk


class Crash(BaseException):
    """The process is dead: nothing may catch this."""


class CrashingDisk(Disk):
    """A Disk that raises Crash in place of the operation after `left` more; None: never. Syncs are not waited for.

    A write or a removal of a tree dies half done.
    """

    def __init__(self) -> None:
        self.left: int | None = None

    def tick(self) -> bool:
        """Whether this operation is the last one."""
        if self.left is None:
            return False
        self.left -= 1
        return self.left < 0

    def synced(self, fd: int) -> None:
        """The bytes of `fd` are durable now."""

    def synced_dir(self, path: Path) -> None:
        """The names in `path` are durable now."""

    def write_at(self, fd: int, buffers: Sequence[bytes | memoryview], offset: int) -> None:
        if self.tick():
            whole = b"".join(buffers)
            os.pwrite(fd, whole[: len(whole) // 2], offset)
            raise Crash
        super().write_at(fd, buffers, offset)

    def remove_tree(self, path: Path) -> None:
        if self.tick():
            for child in sorted(path.iterdir())[:1] if path.is_dir() else []:
                child.unlink()
            raise Crash
        super().remove_tree(path)

    def sync_data(self, fd: int) -> None:
        self._or_die()
        self.synced(fd)

    def sync_file(self, fd: int) -> None:
        self._or_die()
        self.synced(fd)

    def sync_dir(self, path: Path) -> None:
        self._or_die()
        self.synced_dir(path)

    def _or_die(self) -> None:
        if self.tick():
            raise Crash


def _dying(name: str) -> Callable[..., Any]:
    operation = getattr(Disk, name)

    def method(self: CrashingDisk, *args: Any, **kwargs: Any) -> Any:
        self._or_die()
        return operation(self, *args, **kwargs)

    return method


for _name in vars(Disk):
    if not _name.startswith("_") and _name not in vars(CrashingDisk):
        setattr(CrashingDisk, _name, _dying(_name))


class LosingDisk(CrashingDisk):
    """A disk whose power can be cut: of each file the bytes of its last sync are sure, of each directory the names of its
    last sync; of what came after, any part may be there or not."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root
        self._pins: dict[int, int] = {}
        """inode → a descriptor that keeps its number from being used again."""
        self._bytes: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._believe_all()

    def close(self) -> None:
        for fd in self._pins.values():
            os.close(fd)
        self._pins.clear()

    def synced(self, fd: int) -> None:
        inode = os.fstat(fd).st_ino
        if inode not in self._pins:
            self._pins[inode] = os.open(f"/dev/fd/{fd}", os.O_RDONLY)
        self._bytes[inode] = self._current(inode)

    def synced_dir(self, path: Path) -> None:
        self._names[self._pin(path)] = {child.name: self._pin(child) for child in path.iterdir()}

    def cut(self, rng: random.Random) -> None:
        """Power off and on: the tree below the root becomes one that the syncs so far allow."""
        for path in [self._root, *self._root.rglob("*")]:
            self._pin(path)
        after = self._root.with_name("after")
        self._rebuild(self._pin(self._root), after, rng, rng.choice(["lost", "kept", "mixed"]))
        self.close()
        shutil.rmtree(self._root)
        after.rename(self._root)
        self._bytes, self._names, self.left = {}, {}, None
        self._believe_all()

    def _believe_all(self) -> None:
        for path in [self._root, *self._root.rglob("*")]:
            if path.is_dir():
                self.synced_dir(path)
            else:
                inode = self._pin(path)
                self._bytes[inode] = self._current(inode)

    def _pin(self, path: Path) -> int:
        inode = path.lstat().st_ino
        if inode not in self._pins:
            self._pins[inode] = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        return inode

    def _current(self, inode: int) -> bytes:
        fd = self._pins[inode]
        return os.pread(fd, os.fstat(fd).st_size, 0)

    def _rebuild(self, inode: int, path: Path, rng: random.Random, fate: str) -> None:
        mode = os.fstat(self._pins[inode]).st_mode
        if not stat.S_ISDIR(mode):
            path.write_bytes(_mixed(self._bytes.get(inode, b""), self._current(inode), rng, fate))
            path.chmod(stat.S_IMODE(mode))
            return
        path.mkdir(mode=0o700)
        sure = self._names.get(inode, {})
        # Only what was pinned before the cut: a directory that is unlinked lists nothing.
        current = {name: os.stat(name, dir_fd=self._pins[inode]).st_ino for name in os.listdir(self._pins[inode])}  # noqa: PTH208 (a descriptor)
        for name in sorted({*sure, *current}):
            source = {"lost": sure, "kept": current, "mixed": rng.choice([sure, current])}[fate]
            if name in source:
                self._rebuild(source[name], path / name, rng, fate)


def _mixed(sure: bytes, current: bytes, rng: random.Random, fate: str) -> bytes:
    if fate != "mixed":
        return sure if fate == "lost" else current
    size = rng.choice([len(sure), len(current)])
    old, new = sure.ljust(size, b"\0"), current.ljust(size, b"\0")
    return bytes(rng.choice(pair) for pair in zip(old[:size], new[:size], strict=True))
