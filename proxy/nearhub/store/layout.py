"""CACHE/ itself: who may own it, whether it may be used, and where its parts are.

One process owns a cache directory: an flock on CACHE/lock, which dies with the process. Every refusal says what to do.
"""

from __future__ import annotations

import fcntl
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from nearhub.errors import StoreRefused
from nearhub.store.disk import Disk

VERSION = 1
_NETWORK_FS = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "glusterfs", "ncpfs"})


@dataclass(slots=True)
class CacheDir:
    """An opened, owned cache directory. close() gives it up."""

    root: Path
    index: Path
    secret: bytes
    """32 random bytes that only this cache has: what the mirror signs, it signs with them."""
    _lock_fd: int

    @property
    def blobs(self) -> Path:
        return self.root / "blobs"

    @property
    def partial(self) -> Path:
        return self.root / "partial"

    @property
    def quarantine(self) -> Path:
        return self.root / "quarantine"

    @property
    def audit(self) -> Path:
        return self.root / "audit"

    @property
    def git(self) -> Path:
        return self.root / "git"

    @property
    def sites(self) -> Path:
        return self.root / "sites"

    @property
    def log(self) -> Path:
        return self.root / "log"

    def close(self) -> None:
        os.close(self._lock_fd)


def open_cache(root: Path, *, index_dir: Path | None = None, allow_group: bool = False, mounts: str | None = None) -> CacheDir:
    """Create or open `root` and own it until close(). Raises StoreRefused. Blocks.

    `mounts` is the text of /proc/self/mountinfo; None reads it where the system has one.
    """
    disk = Disk()
    root = root.absolute()
    index = (index_dir.absolute() if index_dir else root / "index").resolve()
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise StoreRefused(f"{root}: cannot be created: {os.strerror(exc.errno or 0)}") from exc
    _refuse_unsafe(root, allow_group=allow_group)
    text = _mountinfo() if mounts is None else mounts
    if (kind := filesystem_of(index, text)) in _NETWORK_FS or kind.startswith("fuse.sshfs"):
        raise StoreRefused(
            f"{index}: the index cannot be on a network file system ({kind}): set [cache] index_dir to a local directory"
        )
    lock_fd = _own(root)
    try:
        _check_version(root, disk)
        for part in (
            root / "blobs" / "sha256",
            root / "blobs" / "sha1",
            root / "partial",
            root / "quarantine",
            root / "git",
            index,
        ):
            disk.make_dirs(part)
        secret = _secret(root / "secret", disk)
    except BaseException:
        os.close(lock_fd)
        raise
    return CacheDir(root, index, secret, lock_fd)


def _refuse_unsafe(root: Path, *, allow_group: bool) -> None:
    info = root.lstat()
    if stat.S_ISLNK(info.st_mode):
        info = root.stat()
    if not stat.S_ISDIR(info.st_mode):
        raise StoreRefused(f"{root}: not a directory")
    if info.st_mode & stat.S_IWOTH:
        raise StoreRefused(f"{root}: anybody may write here: chmod o-w it, or choose another --cache-dir")
    if info.st_mode & stat.S_IWGRP and not allow_group:
        raise StoreRefused(
            f"{root}: its group may write here: chmod g-w it, or set [cache] allow_group = true (Kubernetes volumes)"
        )
    if not os.access(root, os.R_OK | os.W_OK | os.X_OK):
        raise StoreRefused(f"{root}: this user cannot read and write here")


def _own(root: Path) -> int:
    try:
        fd = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise StoreRefused(f"{root / 'lock'}: cannot be opened: {os.strerror(exc.errno or 0)}") from exc
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise StoreRefused(f"{root}: another nearhub uses this cache directory: stop it, or choose another") from None
    return fd


def _check_version(root: Path, disk: Disk) -> None:
    path = root / "VERSION"
    try:
        text = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        strangers = sorted(p.name for p in root.iterdir() if p.name not in ("lock", "VERSION.tmp", "lost+found"))
        if strangers:
            raise StoreRefused(
                f"{root}: not empty and not a nearhub cache (there is {strangers[0]!r}): choose an empty directory"
            ) from None
        disk.write_file(path, f"{VERSION}\n".encode())
        return
    except UnicodeDecodeError:
        text = "?"
    except OSError as exc:
        raise StoreRefused(f"{path}: cannot be read: {os.strerror(exc.errno or 0)}") from exc
    if not text.isdigit() or len(text) > 9:
        raise StoreRefused(f"{path}: holds {text[:20]!r}, not a version number: restore it, or choose another directory")
    if int(text) > VERSION:
        raise StoreRefused(f"{root}: written by a newer nearhub (format {text}, this one knows {VERSION}): upgrade")


def _secret(path: Path, disk: Disk) -> bytes:
    """Made once. One that is damaged is made anew: the links signed with it were to live an hour anyway."""
    try:
        secret = path.read_bytes()
    except FileNotFoundError:
        secret = b""
    except OSError as exc:
        raise StoreRefused(f"{path}: cannot be read: {os.strerror(exc.errno or 0)}") from exc
    if len(secret) != 32:
        secret = os.urandom(32)
        disk.write_file(path, secret)
    return secret


def _mountinfo() -> str:
    try:
        return Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def filesystem_of(path: Path, mountinfo: str) -> str:
    """File system type of the mount that `path` is on, "" when unknown. Pure."""
    best, kind = "", ""
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields = left.split(" ")
        if len(fields) < 5 or not right:
            continue
        point = fields[4].replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
        inside = point == "/" or str(path) == point or str(path).startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, right.split(" ")[0]
    return kind
