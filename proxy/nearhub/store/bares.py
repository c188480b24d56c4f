"""Bare mirrors on disk: one directory that git itself keeps for each repo, under a name that no URL can choose.

    git/ab/<64 hex>.git/    the sha256 of the repo's name; git's own files, and `description` with that name
        nearhub.json        what upstream last said, and when
        nearhub.lock        an flock of who writes here, inherited by git: it dies with the process group named in it

Who finds the lock free finds nobody at work: what a killed git left behind (locks, half-written packs) is swept away then.
When it was last used is `description`'s time of change.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from nearhub.errors import StoreFailed
from nearhub.store.blobs import USED_EVERY_S, Held, allocated
from nearhub.store.disk import Disk
from nearhub.wire.target import Repo, RepoKind

_STATE, _LOCK, _NAME = "nearhub.json", "nearhub.lock", "description"
_LEFT_BEHIND = (
    "tmp_*",
    "objects/tmp_*",
    "objects/pack/tmp_*",
    "objects/pack/.tmp-*",
    "objects/??/tmp_obj_*",
    "objects/incoming-*",
    "objects/pack/*.keep",
)
_REF = re.compile(rb"(ref: refs/.+|[0-9a-f]{40}|[0-9a-f]{64})\n")


@dataclass(frozen=True, slots=True, order=True)
class BareId:
    """`name` says whose it is: `models/org/m`, `datasets/org/d`, or `git/NAME` of another host."""

    name: str

    @classmethod
    def of(cls, repo: Repo) -> BareId:
        return cls(f"{repo.kind}/{repo.name}")

    @classmethod
    def named(cls, name: str) -> BareId:
        return cls(f"git/{name}")

    def __str__(self) -> str:
        return f"git of {self.name}"

    def shown(self) -> str:
        """As an operator names it: a repo, or NAME.git of another host."""
        kind, _, name = self.name.partition("/")
        return f"{name}.git" if kind == "git" else str(Repo(RepoKind(kind), name))


@dataclass(frozen=True, slots=True)
class Said:
    """What upstream last said: when (wall seconds), and a digest of all refs."""

    at: float
    refs: str


class BareStore:
    """The directories below `root`. Who uses one holds it, and it is not removed meanwhile. Blocks."""

    def __init__(self, root: Path, disk: Disk | None = None) -> None:
        self._root = root
        self._disk = disk or Disk()
        self._users: Counter[BareId] = Counter()
        self._moving = threading.Lock()
        """Held while users begin or end, and while a directory goes: the one never happens within the other."""

    def recover(self) -> None:
        """Clean up after a crash in the middle of making or removing one."""
        for path in [*self._root.glob("??/new-*"), *self._root.glob("??/removed-*")]:
            self._disk.remove_tree(path)

    def path_of(self, bare: BareId) -> Path:
        digest = hashlib.sha256(bare.name.encode()).hexdigest()
        return self._root / digest[:2] / f"{digest}.git"

    @contextmanager
    def hold(self, bare: BareId) -> Iterator[Path]:
        """The directory, which stays until the end of the context."""
        with self._moving:
            self._users[bare] += 1
        try:
            yield self.path_of(bare)
        finally:
            with self._moving:
                self._users[bare] -= 1
                if not self._users[bare]:
                    del self._users[bare]

    def is_held(self, bare: BareId) -> bool:
        return bare in self._users

    def said(self, bare: BareId) -> Said | None:
        """None: it was never brought to its end, or its record cannot be read: upstream has to be asked."""
        try:
            return Said(**json.loads((self.path_of(bare) / _STATE).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def note_said(self, bare: BareId, said: Said) -> None:
        self._disk.write_file(self.path_of(bare) / _STATE, json.dumps(asdict(said)).encode())

    def lock(self, bare: BareId) -> int | None:
        """A descriptor that makes this process the only writer, for git to inherit; to be closed by the caller.

        None: a git that outlived an earlier process worked there until now. It is being killed: try again soon.
        """
        directory = self.path_of(bare)
        if not directory.is_dir():
            self._make(bare, directory)
        fd = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _kill(os.pread(fd, 20, 0))
            os.close(fd)
            return None
        self.sweep(bare)
        return fd

    def sweep(self, bare: BareId) -> None:
        """Remove what a git that failed or was killed left behind. Nobody writes there now."""
        directory = self.path_of(bare)
        for place in ("*", "refs/**/*", "objects/info/**/*", "objects/pack/*"):
            for lock in directory.glob(f"{place}.lock"):
                if lock.name != _LOCK:
                    self._disk.unlink(lock)
        for pattern in _LEFT_BEHIND:
            for path in directory.glob(pattern):
                self._disk.remove_tree(path)
        for pack in directory.glob("objects/pack/*.pack"):
            if not pack.with_suffix(".idx").exists():
                self._disk.unlink(pack)
        for ref in directory.glob("refs/**/*"):  # few: after a fetch they are packed
            if ref.is_file() and not _REF.fullmatch(ref.read_bytes()):  # as a power cut leaves what was not synced
                self._disk.unlink(ref)

    def _make(self, bare: BareId, directory: Path) -> None:
        """It has its name from its first moment on."""
        new = directory.with_name(f"new-{directory.name}")
        self._disk.remove_tree(new)
        self._disk.make_dirs(new)
        self._disk.write_file(new / _NAME, f"{bare.name}\n".encode())
        self._disk.rename(new, directory)
        self._disk.sync_dir(directory.parent)

    def largest_file(self, bare: BareId) -> int:
        """In bytes, of its packs and what is to become one."""
        return max((path.stat().st_size for path in self.path_of(bare).glob("objects/pack/*")), default=0)

    def note_use(self, bare: BareId) -> None:
        """Written once an hour at most."""
        path = self.path_of(bare) / _NAME
        with suppress(OSError):
            if abs(time.time() - path.stat().st_mtime) > USED_EVERY_S:
                os.utime(path)

    def held(self, bare: BareId) -> Held:
        """Bytes on disk."""
        return Held(_allocated_below(self.path_of(bare)), 0)

    def scan(self) -> Iterator[tuple[BareId, int, float]]:
        """Every mirror, its bytes on disk and when it was last used."""
        for directory in self._root.glob("??/*.git"):
            with suppress(OSError, UnicodeDecodeError):
                bare = BareId((directory / _NAME).read_text(encoding="utf-8").strip())
                if directory.name == self.path_of(bare).name:
                    yield bare, _allocated_below(directory), (directory / _NAME).stat().st_mtime

    def remove(self, bare: BareId) -> None:
        """Moved aside first, so that no half of a mirror is ever taken for one. Raises StoreFailed while it is in use."""
        directory = self.path_of(bare)
        aside = directory.with_name(f"removed-{directory.name}")
        self._disk.remove_tree(aside)
        with self._moving:
            if self.is_held(bare):
                raise StoreFailed(f"{bare} is in use")
            if directory.is_dir():
                self._disk.rename(directory, aside)
        self._disk.remove_tree(aside)


def _kill(group: bytes) -> None:
    """While the lock is held, somebody of that process group lives, so its number means nobody else."""
    if group.isdigit() and int(group) > 1:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(int(group), signal.SIGKILL)


def _allocated_below(directory: Path) -> int:
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):
                total += allocated(os.lstat(f"{folder}/{name}"))
    return total
