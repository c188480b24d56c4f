"""hf.lock: which commit of which repo a run may use, and what each file must be. `nearhub lock` writes it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "hf.lock"
VERSION = 1
_HEX = re.compile(r"[0-9a-f]+\Z")
_DIGITS = {"lfs": 64, "git": 40}
_READ = 1 << 20


class LockError(Exception):
    """The lock cannot be used, or what is to be used is not what it says; the message names both."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What a file is. `kind`: lfs (`hex` is the sha256 of its bytes) or git (the sha1 of it as git's blob); `size` in bytes."""

    kind: str
    hex: str
    size: int

    def __str__(self) -> str:
        return f"{self.kind} {self.hex} of {self.size:,} bytes"


@dataclass(frozen=True, slots=True)
class Pin:
    """One repo of a lock. `where`: the lock, as messages name it."""

    where: str
    repo: str
    revision: str
    commit: str
    files: Mapping[str, Mark]

    def asked(self, revision: str) -> str:
        """What to ask a mirror for: the locked commit, when the recipe names the branch or tag that was locked."""
        return self.commit if revision == self.revision else revision

    def refuse_commit(self, commit: str) -> None:
        if commit != self.commit:
            raise LockError(f"{self.repo} would be used at commit {commit}, and {self.where} has {self.commit}")

    def refuse(self, path: str, found: Mark | None, who: str) -> None:
        """`found` None: `who` does not have it."""
        locked = self.files.get(path)
        if locked != found:
            raise LockError(f"{path} of {self.repo}: {self.where} has {locked or 'no such file'}, {who} has {found or 'none'}")

    def refuse_files(self, folder: Path) -> int:
        """Hash every file that is below `folder`; returns how many. Raises LockError at the first that is not as locked."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in paths:
            name = path.relative_to(folder).as_posix()
            locked = self.files.get(name)
            self.refuse(name, mark_of(path, "git" if locked is None else locked.kind), str(folder))
        return len(paths)


def read(path: Path) -> dict[str, Pin]:
    """Repo, as nearhub writes its name (`org/name`, `datasets/org/name`) → what is locked. Raises LockError."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise LockError(f"{path} cannot be read: {exc}") from exc
    if not isinstance(told, dict) or not isinstance(told.get("repos"), dict) or "version" not in told:
        raise LockError(f"{path} is no hf.lock: nearhub lock REPO writes one")
    if told["version"] != VERSION:
        raise LockError(f"{path} is of version {told['version']!r}, and this neartune knows {VERSION}: upgrade neartune")
    try:
        return {repo: _pin(path, repo, row) for repo, row in told["repos"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as exc:
        raise LockError(f"{path} is damaged: lock anew with nearhub lock") from exc


def _pin(path: Path, repo: str, row: Mapping[str, Any]) -> Pin:
    files = {name: _mark(told) for name, told in row["files"].items()}
    if len(row["commit"]) != 40 or not _HEX.match(row["commit"]):
        raise ValueError(row["commit"])
    return Pin(str(path), repo, str(row["revision"]), row["commit"], files)


def _mark(told: Mapping[str, Any]) -> Mark:
    (kind,) = told.keys() & _DIGITS.keys()
    if len(told[kind]) != _DIGITS[kind] or not _HEX.match(told[kind]) or type(told["size"]) is not int:
        raise ValueError(told)
    return Mark(kind, told[kind], told["size"])


def pin_of(lock: Path | None, name: str, kind: str = "model") -> Pin | None:
    """Of a repo on the Hub. None: nothing is locked. Raises LockError, also where there is a lock that does not name it."""
    if lock is None:
        return None
    repo = name if kind == "model" else f"{kind}s/{name}"
    pins = read(lock)
    if repo not in pins:
        raise LockError(f"{lock} does not name {repo}: nearhub lock {repo} adds it, `lock: null` in the recipe goes without")
    return pins[repo]


def mark_of(path: Path, kind: str) -> Mark:
    size = path.stat().st_size
    digest = hashlib.sha256() if kind == "lfs" else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(_READ):
            digest.update(piece)
    return Mark(kind, digest.hexdigest(), size)
